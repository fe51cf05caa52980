"""Reading JSON and safetensors that nobody vouches for, and writing them so that a failure loses nothing."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.checkpoint import write_file
from trimtab.core.errors import TrimtabError

__all__ = ["check_relative", "inside", "option", "positive", "read_json", "read_tensors", "write_pair"]

T = TypeVar("T", bool, int, float, str, dict)

MAX_JSON_BYTES = 64 * 2**20
"""Far above any honest configuration, far below what would exhaust a machine."""

FLOATS = {"F64", "F32", "F16", "BF16"}


def check_relative(argument: str, name: str) -> None:
    """Refuse a `name` that is not a path further down: an absolute one, or one with '..' in it."""
    path = PureWindowsPath(name)  # which knows both separators, and drives
    if path.anchor or ".." in path.parts or "\0" in name:
        raise TrimtabError(f"{argument}={name!r} must be a relative path without '..', for instance 'resid.9'")


def inside(argument: str, root: Path, name: str) -> Path:
    """`root / name`, if that is in `root` once links are followed."""
    check_relative(argument, name)
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise TrimtabError(f"{argument}={name!r} leads out of {root} through a link to {path.resolve()}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`; raises TrimtabError unless every number in it is finite."""
    _check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise TrimtabError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise TrimtabError(f"{path} is larger than {MAX_JSON_BYTES} bytes, the most that is read")
    try:
        content = json.loads(data.decode("utf-8"))
        broken = _not_finite(content, "")
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{path} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TrimtabError(f"{path} holds {reprlib.repr(content)}; accepted: a JSON object")
    if broken:
        raise TrimtabError(f"{path}: {broken} is NaN or infinite; accepted: finite numbers")
    return content


def option(path: Path, fields: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """`fields[name]` of exactly the type `kind`, or `default` where it is missing and there is one."""
    value = fields.get(name, default)
    if name not in fields and default is None:
        raise TrimtabError(f"{path}: {name} is missing; accepted: {_NAMES[kind]}")
    if type(value) is not kind:
        raise TrimtabError(f"{path}: {name}={reprlib.repr(value)}; accepted: {_NAMES[kind]}")
    return value


def positive(path: Path, fields: Mapping[str, Any], name: str) -> int:
    """`fields[name]`, which must be there and be an integer of 1 or more."""
    value = option(path, fields, name, int)
    if value < 1:
        raise TrimtabError(f"{path}: {name}={reprlib.repr(value)}; accepted: an integer of 1 or more")
    return value


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, if they are exactly those of `shapes`; none is read before that is known.

    source: what the shapes were derived from, for the message.
    """
    _check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _check_tensors(
                path, {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in found.items()}, shapes, source
            )
            # Cloned: a mapped tensor would change with the file.
            return {name: file.get_tensor(name).clone() for name in shapes}
    except (SafetensorError, OSError) as error:
        raise TrimtabError(f"{path} is truncated or not a safetensors file: {error}") from error


def write_pair(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], name: str, content: dict[str, Any]
) -> None:
    """Write tensor files and then the JSON file `name` into `directory`; a file is replaced whole or not at all."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TrimtabError(f"metadata must hold JSON values only, for {directory / name}: {error}") from error
    directory.mkdir(parents=True, exist_ok=True)
    for file_name, named in tensors.items():
        _write_tensors(directory / file_name, named)
    write_file(directory / name, text.encode("utf-8"))


_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number with a decimal point",
    str: "a string",
    dict: "an object",
}


def _check_regular(path: Path) -> None:
    """Refuse what is missing, and what could block or never end: a pipe, a device."""
    if path.is_file():
        return
    if not path.exists():
        raise TrimtabError(f"{path} is missing")
    raise TrimtabError(f"{path} is not a regular file")


def _not_finite(value: Any, place: str) -> str:
    """Where in `value` the first number is that is not finite; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else place or "the value"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_not_finite(item, f"{place}.{key}" if place else str(key)) for key, item in items)
    return next((where for where in found if where), "")


def _check_tensors(
    path: Path,
    found: Mapping[str, tuple[tuple[int, ...], str]],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    for missing in shapes.keys() - found.keys():
        raise TrimtabError(f"{path}: tensor {missing} is missing; accepted: {', '.join(shapes)}")
    for extra in found.keys() - shapes.keys():
        raise TrimtabError(f"{path}: tensor {extra[:200]!r} is not known; accepted: {', '.join(shapes)}")
    for name, (shape, dtype) in found.items():
        if shape != shapes[name]:
            raise TrimtabError(f"{path}: {name} has shape {list(shape)}; {source} asks for {list(shapes[name])}")
        if dtype not in FLOATS:
            raise TrimtabError(f"{path}: {name} has dtype {dtype}; accepted: {', '.join(sorted(FLOATS))}")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
        # safetensors makes its files private; here the umask decides, which the directory shows.
        aside.chmod(path.parent.stat().st_mode & 0o666)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
