"""Checkpoints: directories that are complete or absent, holding safetensors and JSON, with checksums.

A checkpoint of step 123 is the directory `root/step-00000123` with two files:

    tensors.safetensors   every tensor of the tree
    state.json            {"format", "format_version", "step", "identity", "files", "tree", "sha256"}

`files` gives the size and SHA-256 of the tensor file, `sha256` that of everything else in `state.json`, and
`tree` the structure, in which each tensor is named by its key in the tensor file. Nothing is pickled.

A write goes to a directory aside (`step-00000123.tmp-<pid>`), which is flushed to the disk and then
renamed, so that a reader, or a process killed at any moment, finds the old checkpoint, the new one or both,
never a half. One process writes to a root at a time; in a distributed run that is rank 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trimtab.core._rng import rng_state, set_rng_state
from trimtab.core._tree import decode, encode
from trimtab.core.errors import TrimtabError
from trimtab.core.files import remove, write_directory, write_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "latest",
    "load",
    "rng_state",
    "save",
    "set_rng_state",
    "write_directory",
    "write_file",
]

FORMAT = "trimtab.checkpoint"
FORMAT_VERSION = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
# Far above any honest tree (tensors are elsewhere), far below what would exhaust a machine.
MAX_STATE_BYTES = 64 * 2**20

# A checkpoint that was being replaced when its writer was killed counts until the next save.
_CHECKPOINT = re.compile(r"step-(\d{8,})(\.old-\d+)?")
_TEMPORARY = re.compile(r"step-\d{8,}(\.old-\d+)?\.tmp-\d+")


class CheckpointError(TrimtabError):
    """A checkpoint is missing, damaged, of another run or version, or cannot be written."""


class _DamagedError(CheckpointError):
    """Truncated, altered or hostile: what `allow_previous` may step over."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: `tree` as it was saved, tensors on the CPU, at `step`, in the directory `path`."""

    step: int
    tree: Any
    path: Path
    identity: dict[str, Any]


def save(
    root: str | Path, step: int, tree: Any, *, identity: Mapping[str, Any] | None = None, keep_last: int = 2
) -> Path:
    """Write `tree` as the checkpoint of `step` under `root`, then delete all but the `keep_last` newest.

    Args:
        root: directory of the checkpoints of one run; made if missing.
        step: 0 or more, and not before a whole checkpoint that `root` holds. The same step again replaces
            it; damaged checkpoints of later steps are removed.
        tree: nested dicts (keys str or int), lists and tuples of tensors (dense, of any dtype of
            safetensors) and of None, bool, int, float (NaN and infinities too) and str. The state_dict() of
            a model or optimizer qualifies as it is. A view is stored alone, a tensor that is there twice is
            stored twice; strides, devices and dict subclasses are not kept.
        identity: what this run is (model fingerprint, shapes, …), JSON values; see `expect` of `load`.
        keep_last: 1 or more.

    Returns:
        the directory of the new checkpoint.

    Raises:
        TrimtabError: for a value in `tree` that cannot be stored (its place is named).
        CheckpointError: if the disk refuses (full, read-only); the checkpoints that were there are intact.
    """
    if isinstance(step, bool) or step < 0:
        raise TrimtabError(f"step={step!r}: a step is an int of 0 or more.")
    if keep_last < 1:
        raise TrimtabError(f"keep_last={keep_last}: at least 1 checkpoint is kept.")
    structure, tensors = encode(tree)
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "tree": structure}
    body["identity"] = _plain_json("identity", identity or {})
    root = Path(root)
    path = root / f"step-{step:08d}"
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link: a checkpoint is not written through one.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(root)
        _clear_later(root, step)
        with write_directory(path) as temporary:
            save_file(tensors, temporary / TENSORS)
            with (temporary / TENSORS).open("rb") as file:
                body["files"] = {TENSORS: _size_and_digest(file)}
            (temporary / STATE).write_bytes(_state_bytes(body))
    except (OSError, SafetensorError) as error:
        last = latest(root)
        left = f"The last one, {last}, is intact." if last else "There was none before it."
        raise CheckpointError(f"root={str(root)!r}: writing step {step} failed: {error}. {left}") from error
    for old in _checkpoints(root)[:-keep_last]:
        remove(old)
    return path


def load(root: str | Path, *, allow_previous: bool = False, expect: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read the newest checkpoint under `root`, after checking every size and checksum.

    Args:
        root: the directory given to `save`.
        allow_previous: if the newest is damaged, warn and use the newest one that is whole.
        expect: values that the saved `identity` must have; what `expect` does not name is not compared.

    Raises:
        CheckpointError: no checkpoint; a damaged one (file and fault are named); one written by a newer
            Trimtab; or an `identity` that differs from `expect` (each key with both values).
    """
    candidates = _checkpoints(Path(root))[::-1]
    if not candidates:
        raise CheckpointError(f"root={str(root)!r} holds no checkpoint (no directory step-…).")
    checkpoint, faults = None, []
    for path in candidates if allow_previous else candidates[:1]:
        try:
            checkpoint = _read(path)
            break
        except _DamagedError as error:
            faults.append(str(error))
    if checkpoint is None:
        hint = "" if allow_previous else " allow_previous=True uses an earlier whole one, if there is one."
        raise CheckpointError("; ".join(faults) + "." + hint)
    if faults:
        warnings.warn(f"using {checkpoint.path}, because {'; '.join(faults)}", stacklevel=2)
    differing = _differences(_plain_json("expect", expect or {}), checkpoint.identity)
    if differing:
        raise CheckpointError(f"{checkpoint.path} belongs to another run: {'; '.join(differing)}.")
    return checkpoint


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint directory under `root`, unread; None if there is none."""
    found = _checkpoints(Path(root))
    return found[-1] if found else None


# ---------------------------------------------------------------- reading


def _read(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`, fully checked."""
    if path.is_symlink():
        raise _DamagedError(f"{path} is a symbolic link, which is not followed")
    state = _read_state(path / STATE)
    if state.get("step") != _step(path):
        raise _DamagedError(f"{path / STATE} is of step {state.get('step')!r}, unlike its directory")
    files, identity = state.get("files"), state.get("identity")
    if not isinstance(files, dict) or list(files) != [TENSORS] or not isinstance(identity, dict):
        raise _DamagedError(f"{path / STATE} must list the file {TENSORS!r} alone, and has {files!r}")
    with _open_regular(path / TENSORS) as file:
        found = _size_and_digest(file)
    if found != files[TENSORS]:
        raise _DamagedError(
            f"{path / TENSORS} was truncated or altered: it has {found}, and {files[TENSORS]} was saved"
        )
    try:
        with safe_open(path / TENSORS, framework="pt") as tensors:
            # Cloned: a mapped tensor would be tied to the file, and aligned to 8 bytes where a fresh one is
            # aligned to 64; vectorised sums of the two may differ in the last bit.
            loaded = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
        tree = decode(state.get("tree"), loaded)
    except (SafetensorError, TrimtabError) as error:
        raise _DamagedError(f"{path} cannot be decoded: {error}") from error
    return Checkpoint(step=state["step"], tree=tree, path=path, identity=identity)


def _read_state(path: Path) -> dict[str, Any]:
    with _open_regular(path) as file:
        data = file.read(MAX_STATE_BYTES + 1)
    if len(data) > MAX_STATE_BYTES:
        raise _DamagedError(f"{path} is larger than {MAX_STATE_BYTES} bytes, the most that is read")
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{path} is not valid JSON (truncated or altered): {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _DamagedError(f"{path} is not the state of a Trimtab checkpoint: it lacks format={FORMAT!r}")
    version = state.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version={version}, of a newer Trimtab; this one reads up to {FORMAT_VERSION}."
        )
    digest = state.pop("sha256", None)
    if version != FORMAT_VERSION or digest != _digest(state):
        raise _DamagedError(f"{path} was altered: its content does not match its own checksum")
    return state


def _open_regular(path: Path) -> BufferedReader:
    """`path` opened for reading, if it is a regular file and not a link (nor a pipe, which would block)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error}"
        raise _DamagedError(f"{path} {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _DamagedError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _differences(expected: Mapping[str, Any], stored: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for each key of `expected` whose stored value is another one."""
    found = []
    for key, value in expected.items():
        if key not in stored:
            found.append(f"{prefix}{key} is not recorded there, expected {value!r}")
        elif isinstance(value, dict) and isinstance(stored[key], dict):
            found += _differences(value, stored[key], f"{prefix}{key}.")
        elif value != stored[key]:
            found.append(f"{prefix}{key} is {stored[key]!r} there, expected {value!r}")
    return found


def _checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories under `root`, oldest step first; of one step, the one being replaced first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), ".old-" not in path.name))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").split(".")[0])


# ---------------------------------------------------------------- writing


def _plain_json(argument: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON (tuples are lists), so that comparing it later is exact."""
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TrimtabError(f"{argument}={value!r} must hold JSON values only: {error}.") from error


def _state_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body | {"sha256": _digest(body)}, allow_nan=False).encode()
    if len(data) > MAX_STATE_BYTES:
        raise TrimtabError(
            f"tree holds {len(data)} bytes outside its tensors, and {MAX_STATE_BYTES} are accepted: long "
            "sequences of numbers belong into tensors."
        )
    return data


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _size_and_digest(file: BufferedReader) -> dict[str, Any]:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _clear_leftovers(root: Path) -> None:
    """Clear what killed writers left: half-written checkpoints, and replaced ones that have an heir."""
    for path in list(root.iterdir()):
        match = _CHECKPOINT.fullmatch(path.name)
        home = root / path.name.removesuffix(match[2] or "") if match else path
        if home != path and not home.exists():
            path.rename(home)
        elif home != path or _TEMPORARY.fullmatch(path.name):
            remove(path)


def _clear_later(root: Path, step: int) -> None:
    """Remove damaged checkpoints after `step` (the run went on from before); a whole one is an error."""
    for path in _checkpoints(root):
        if _step(path) <= step:
            continue
        try:
            _read(path)
        except _DamagedError:
            remove(path)
            continue
        raise TrimtabError(
            f"step={step} is before {path}, which is whole: resume from it, remove it, or give another root."
        )
