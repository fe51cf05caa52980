"""What goes in comes out; the damaged, foreign or hostile does not; a kill at any moment loses nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.core import checkpoint, files
from trimtab.core._tree import STORED_DTYPES
from trimtab.core.checkpoint import CheckpointError, latest, load, save, write_directory, write_file
from trimtab.core.errors import TrimtabError


def _round_trip(root: Path, tree: Any) -> Any:
    save(root, 1, tree)
    return load(root).tree


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("dtype", sorted(STORED_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=str)
def test_tensors_of_every_dtype_return_bit_equal(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    value = (torch.arange(math.prod(shape)).reshape(shape) % 3).to(torch.float32).to(dtype)
    found = _round_trip(tmp_path, value)
    assert (found.dtype, found.shape) == (dtype, torch.Size(shape))
    assert _bits(found) == _bits(value)


def test_nan_payloads_and_infinities_return_bit_equal(tmp_path: Path):
    value = torch.tensor([0x7FC00001, 0x7F800000, -0x800000, -0x80000000], dtype=torch.int32).view(torch.float32)
    assert _bits(_round_trip(tmp_path, value)) == _bits(value)


def test_views_shared_and_lazy_tensors_return_their_values(tmp_path: Path):
    base = torch.arange(35.0).reshape(5, 7)
    tree = {"base": base, "again": base, "part": base[1:3], "columns": base.T, "strided": base[:, ::2]}
    tree["conjugate"] = torch.tensor([1 + 2j]).conj()
    tree["parameter"] = torch.nn.Parameter(base[0])
    found = _round_trip(tmp_path, tree)
    for name, value in tree.items():
        torch.testing.assert_close(found[name], value.detach().resolve_conj(), rtol=0, atol=0)
    assert type(found["parameter"]) is Tensor
    assert found["base"].data_ptr() % 64 == 0, "a loaded tensor is allocated anew, not mapped from the file"


def test_python_values_return_with_their_types(tmp_path: Path):
    tree = {
        "none": None,
        "flags": [True, False, 1, 0],
        "floats": (0.1, -0.0, 1e-323, 1.0, 2**0.5),
        "big": 2**80,
        "text": 'é\ud800\n"',
        "empty": [{}, [], ()],
        0: {"0": "text key", 0: "int key"},
        "tensor": "not one",
        "nested": ({"a": [(1, [2.5])]},),
    }
    found = _round_trip(tmp_path, tree)
    assert found == tree
    assert repr(found) == repr(tree)  # == takes 1, 1.0 and True, and 0.0 and -0.0, for the same


def test_nan_and_infinite_floats_return(tmp_path: Path):
    found = _round_trip(tmp_path, [math.nan, math.inf, -math.inf])
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf]


def test_keys_that_read_alike_keep_their_tensors_apart(tmp_path: Path):
    tree = {0: torch.tensor(1), "0": torch.tensor(2), "a": {"b": torch.tensor(3)}, "a/b": torch.tensor(4)}
    tree["__metadata__"] = torch.tensor(5)
    found = _round_trip(tmp_path, tree)
    assert list(found) == list(tree)
    assert [found[0], found["0"], found["a"]["b"], found["a/b"], found["__metadata__"]] == [1, 2, 3, 4, 5]


def test_a_resumed_optimizer_steps_as_the_first_one_did(tmp_path: Path):
    def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = torch.nn.Linear(7, 5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

    def train(model: Any, optimizer: Any, schedule: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 7)).square().sum().backward()
            optimizer.step()
            schedule.step()

    first = parts()
    train(*first, steps=3)
    tree = {name: part.state_dict() for name, part in zip("mos", first, strict=True)}
    save(tmp_path, 3, tree | {"rng": checkpoint.rng_state()})
    train(*first, steps=4)

    second = parts()
    tree = load(tmp_path).tree
    for name, part in zip("mos", second, strict=True):
        part.load_state_dict(tree[name])
    checkpoint.set_rng_state(tree["rng"])
    train(*second, steps=4)
    for ours, theirs in zip(second[0].parameters(), first[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_random_generators_continue_where_they_were(tmp_path: Path):
    def draw() -> list[Any]:
        python = [random.random(), random.gauss(0, 1), random.getrandbits(70)]
        return [
            *python,
            *np.random.randn(3).tolist(),
            *torch.randn(5).tolist(),
            torch.randint(9, (2,)).tolist(),
        ]

    draw()  # leaves a second normal deviate waiting in python's and in numpy's generator
    state = checkpoint.rng_state()
    expected = draw()  # at once: the checker of annotations draws from `random` itself
    save(tmp_path, 1, state)
    checkpoint.set_rng_state(load(tmp_path).tree)
    assert draw() == expected


def test_another_number_of_cuda_devices_is_told():
    state = checkpoint.rng_state()
    state["cuda"].append(torch.zeros(16, dtype=torch.uint8))
    with pytest.warns(UserWarning, match=f"{len(state['cuda'])} CUDA devices were saved"):
        checkpoint.set_rng_state(state)


# ---------------------------------------------------------------- what cannot be stored


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {3}]}, r"tree\['a'\]\[1\] is a builtins\.set"),
        ({"a": np.float64(1)}, r"tree\['a'\] is a numpy\.float64.*\.item\(\)"),
        ((np.int32(1),), r"tree\[0\] is a numpy\.int32.*\.item\(\)"),
        ({"a": np.zeros(2)}, r"tree\['a'\] is a numpy\.ndarray.*from_numpy"),
        ({"a": {(1, 2): 3}}, r"tree\['a'\] has the key \(1, 2\)"),
        ({True: 3}, r"tree has the key True"),
        ({"a": torch.Size([1])}, r"tree\['a'\] is a torch\.Size"),
        ({"a": torch.eye(2).to_sparse()}, r"tree\['a'\] is a tensor.*sparse"),
        ({"a": torch.zeros(2, device="meta")}, r"tree\['a'\] is a tensor.*meta"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, r"tree\['a'\] is a tensor of torch\.complex128"),
        (
            {"a": torch.nn.Buffer(torch.zeros(2)).as_subclass(type("Other", (Tensor,), {}))},
            "is a Other; plain",
        ),
        ({"a": print}, r"tree\['a'\] is a builtins\.builtin_function_or_method"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named_by_its_place(tmp_path: Path, value: Any, message: str):
    with pytest.raises(TrimtabError, match=message):
        save(tmp_path / "root", 1, value)
    assert not (tmp_path / "root").exists()


def test_a_tree_that_contains_itself_is_an_error(tmp_path: Path):
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(TrimtabError, match="contain itself"):
        save(tmp_path, 1, tree)


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(TrimtabError, match="step=-1"):
        save(tmp_path, -1, {})
    with pytest.raises(TrimtabError, match="keep_last=0"):
        save(tmp_path, 1, {}, keep_last=0)
    with pytest.raises(TrimtabError, match=r"identity=.*must hold JSON values"):
        save(tmp_path, 1, {}, identity={"model": torch.nn.Linear(1, 1)})
    with pytest.raises(TrimtabError, match="state is not what rng_state returned"):
        checkpoint.set_rng_state({"python": 1})


def test_numbers_beside_the_tensors_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "MAX_STATE_BYTES", 1000)
    with pytest.raises(TrimtabError, match="belong into tensors"):
        save(tmp_path, 1, list(range(999)))
    assert latest(tmp_path) is None


# ---------------------------------------------------------------- which ones are kept


def test_the_last_ones_are_kept_and_the_newest_is_loaded(tmp_path: Path):
    assert latest(tmp_path / "absent") is None
    for step in (1, 20, 300):
        path = save(tmp_path, step, {"step": step}, keep_last=2)
        assert path == latest(tmp_path)
    assert _names(tmp_path) == ["step-00000020", "step-00000300"]
    found = load(tmp_path)
    assert (found.step, found.tree, found.path) == (300, {"step": 300}, tmp_path / "step-00000300")
    save(tmp_path, 123456789, None, keep_last=1)
    assert _names(tmp_path) == ["step-123456789"]


def test_the_same_step_is_replaced(tmp_path: Path):
    save(tmp_path, 7, {"take": 1})
    save(tmp_path, 7, {"take": 2})
    assert _names(tmp_path) == ["step-00000007"]
    assert load(tmp_path).tree == {"take": 2}


def test_a_step_before_a_whole_later_one_is_refused_and_a_damaged_later_one_goes(tmp_path: Path):
    save(tmp_path, 10, {})
    with pytest.raises(TrimtabError, match=r"step=5 is before .*step-00000010"):
        save(tmp_path, 5, {})
    (tmp_path / "step-00000010" / "state.json").write_bytes(b"")
    save(tmp_path, 5, {})
    assert _names(tmp_path) == ["step-00000005"]


def test_leftovers_of_killed_runs_are_cleared_and_other_files_stay(tmp_path: Path):
    save(tmp_path, 1, {"a": 1})
    leftovers = ["step-00000002.tmp-77", "step-00000001.old-77", "step-00000001.old-77.tmp-78"]
    for name in [*leftovers, "step-notes", "logs.tmp-77"]:
        (tmp_path / name).mkdir()
    save(tmp_path, 2, {"a": 2})
    assert _names(tmp_path) == ["logs.tmp-77", "step-00000001", "step-00000002", "step-notes"]


def test_a_checkpoint_that_was_being_replaced_counts(tmp_path: Path):
    save(tmp_path, 1, {"a": 1}).rename(tmp_path / "step-00000001.old-77")
    assert load(tmp_path).tree == {"a": 1}
    save(tmp_path, 1, {"a": 2})
    assert _names(tmp_path) == ["step-00000001"]


# ---------------------------------------------------------------- another run, another version


def test_another_run_is_refused_with_both_values(tmp_path: Path):
    save(tmp_path, 1, {}, identity={"model": "a1b2", "shape": (640, 4096), "sae": {"k": 32, "seed": 0}})
    load(tmp_path, expect={"shape": (640, 4096), "sae": {"k": 32}})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, expect={"model": "c3", "shape": [640, 8192], "sae": {"k": 64}, "dtype": "float32"})
    message = str(caught.value)
    assert "model is 'a1b2' there, expected 'c3'" in message
    assert "shape is [640, 4096] there, expected [640, 8192]" in message
    assert "sae.k is 32 there, expected 64" in message
    assert "dtype is not recorded there, expected 'float32'" in message


def _edit_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `state.json` as one would who knows how its checksum is made."""
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    change(state)
    state["sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))


def test_a_newer_format_is_refused_and_not_stepped_over(tmp_path: Path):
    save(tmp_path, 1, {})
    _edit_state(save(tmp_path, 2, {}), lambda state: state.update(format_version=2))
    with pytest.raises(CheckpointError, match="format_version=2, of a newer Trimtab; this one reads up to 1"):
        load(tmp_path, allow_previous=True)


def test_no_checkpoint_is_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path / "absent")


# ---------------------------------------------------------------- damage


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors cut": (
        lambda path: os.truncate(path / "tensors.safetensors", 90),
        "tensors.*truncated or altered",
    ),
    "tensors flipped": (
        lambda path: _flip(path / "tensors.safetensors", -1),
        "tensors.*truncated or altered",
    ),
    "tensors gone": (lambda path: (path / "tensors.safetensors").unlink(), "tensors.*cannot be read"),
    "state cut": (lambda path: os.truncate(path / "state.json", 40), r"state\.json is not valid JSON"),
    "state flipped": (lambda path: _flip(path / "state.json", -3), r"state\.json was altered"),
    "state gone": (lambda path: (path / "state.json").unlink(), r"state\.json cannot be read"),
    "state empty": (
        lambda path: (path / "state.json").write_text("{}"),
        "not the state of a Trimtab checkpoint",
    ),
    "state deep": (
        lambda path: (path / "state.json").write_text("[" * 100_000),
        r"state\.json is not valid JSON",
    ),
    "state huge": (lambda path: os.truncate(path / "state.json", 2**40), r"state\.json is larger than"),
    "other step": (lambda path: _edit_state(path, lambda state: state.update(step=9)), "of step 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_one_used_if_allowed(tmp_path: Path, damage: str):
    save(tmp_path, 1, {"w": torch.zeros(9)})
    path = save(tmp_path, 2, {"w": torch.ones(9)})
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.raises(CheckpointError, match=message + r".*allow_previous=True"):
        load(tmp_path)
    with pytest.warns(UserWarning, match=f"using .*step-00000001, because .*{message}"):
        assert load(tmp_path, allow_previous=True).step == 1


def test_if_all_are_damaged_each_fault_is_told(tmp_path: Path):
    for step in (1, 2):
        (save(tmp_path, step, {}) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002.*step-00000001"):
        load(tmp_path, allow_previous=True)


def _tensors_with_header(path: Path, header: dict[str, Any]) -> None:
    """Put a tensor file with this header in place, with matching size and checksum in the state."""
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    (path / "tensors.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _edit_state(path, lambda state: state.update(files={"tensors.safetensors": entry}))


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"w": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}},
        {"other": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=["huge", "overflow", "negative", "unknown dtype", "renamed"],
)
def test_a_hostile_tensor_header_is_an_error(tmp_path: Path, header: dict[str, Any]):
    path = save(tmp_path, 1, {"w": torch.zeros(2)})
    _tensors_with_header(path, header)
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        load(tmp_path)


def test_a_header_longer_than_the_file_is_an_error(tmp_path: Path):
    path = save(tmp_path, 1, {"w": torch.zeros(2)})
    data = (2**63 - 1).to_bytes(8, "little") + b"{}"
    (path / "tensors.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _edit_state(path, lambda state: state.update(files={"tensors.safetensors": entry}))
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        load(tmp_path)


@pytest.mark.parametrize(
    "files",
    [{"../secret": {}}, {"/etc/passwd": {}}, {"tensors.safetensors": {}, "../secret": {}}, ["x"], None],
    ids=str,
)
def test_only_the_known_file_is_opened(tmp_path: Path, files: Any):
    _edit_state(save(tmp_path, 1, {}), lambda state: state.update(files=files))
    with pytest.raises(CheckpointError, match=r"must list the file 'tensors\.safetensors' alone"):
        load(tmp_path)


@pytest.mark.parametrize(
    "node",
    [
        {"pickle": "x"},
        {"tensor": "../w"},
        {"tensor": ["w"]},
        {"float": "1e5"},
        {"dict": [[1]]},
        {"dict": 3},
        {},
    ],
    ids=str,
)
def test_a_tree_of_unknown_form_is_an_error(tmp_path: Path, node: Any):
    _edit_state(save(tmp_path, 1, {"w": torch.zeros(2)}), lambda state: state.update(tree=[node]))
    with pytest.raises(CheckpointError, match="cannot be decoded"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_links_are_not_followed(tmp_path: Path, name: str):
    path = save(tmp_path / "root", 1, {"w": torch.zeros(2)})
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        load(tmp_path / "root")


def test_a_linked_directory_is_neither_read_nor_written(tmp_path: Path):
    elsewhere = save(tmp_path / "elsewhere", 1, {"w": 1})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "step-00000001").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        load(tmp_path / "root")
    with pytest.raises(CheckpointError, match="symbolic link"):
        save(tmp_path / "root", 1, {"w": 2})
    save(tmp_path / "root", 2, {}, keep_last=1)
    assert _names(tmp_path / "root") == ["step-00000002"]
    assert load(tmp_path / "elsewhere").tree == {"w": 1}


def test_a_pipe_does_not_block(tmp_path: Path):
    path = save(tmp_path, 1, {})
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(tmp_path)


# ---------------------------------------------------------------- full disks and kills


@pytest.mark.parametrize("where", ["save_file", "fsync of a file", "fsync of a directory"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    save(tmp_path, 1, {"w": torch.zeros(9)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        flush, wanted = files._flush, where.endswith("directory")
        monkeypatch.setattr(files, "_flush", lambda path: (full if path.is_dir() == wanted else flush)(path))
    with pytest.raises(CheckpointError, match=r"writing step 2 failed: .*No space left.*step-00000001, is intact"):
        save(tmp_path, 2, {"w": torch.ones(9)})
    assert _names(tmp_path) == ["step-00000001"]
    assert load(tmp_path).step == 1


# One interpreter imports torch, and forks the writers that are limited or killed.
PRELUDE = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from trimtab.core import checkpoint
torch.set_num_threads(1)
root = Path(sys.argv[1])

def tree(step):
    weight = torch.arange(3001, dtype=torch.float32) * step
    return {"weight": weight, "half": weight[:7].bfloat16(), "step": step}

def check(found):
    want = tree(found.step)
    assert torch.equal(found.tree["weight"], want["weight"]) and torch.equal(found.tree["half"], want["half"])
    assert found.tree["step"] == found.step

def forked(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child
"""


def _run_script(script: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_write_that_the_system_cuts_short_leaves_the_previous_checkpoint(tmp_path: Path):
    script = """
    checkpoint.save(root, 1, tree(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        checkpoint.save(root, 2, tree(2))
        message = "saved"
    except checkpoint.CheckpointError as error:
        message = str(error)
    check(checkpoint.load(root))
    print(json.dumps([message, os.listdir(root)]))
    """
    message, names = _run_script(_dedent(script), tmp_path)
    assert "writing step 2 failed" in message
    assert "File too large" in message
    assert "step-00000001, is intact" in message
    assert names == ["step-00000001"]


def _dedent(script: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in script.splitlines())


def test_ten_kills_at_random_moments_lose_nothing_that_was_saved(tmp_path: Path):
    script = """
    moments = random.Random(0)
    reached = []
    for _ in range(10):
        reader, writer = os.pipe()
        last = checkpoint.load(root).step if checkpoint.latest(root) else 0

        def save_without_end():
            step = last
            while True:
                step += 1
                checkpoint.save(root, step, tree(step))
                os.write(writer, step.to_bytes(4))

        child = forked(save_without_end)
        os.read(reader, 4)
        time.sleep(moments.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(writer)
        told = os.read(reader, 2**16)
        acknowledged = int.from_bytes(told[-4:]) if told else last + 1
        os.close(reader)
        found = checkpoint.load(root)
        check(found)
        assert found.step in (acknowledged, acknowledged + 1), (found.step, acknowledged)
        reached.append(found.step)
    checkpoint.save(root, found.step + 1, tree(found.step + 1))
    print(json.dumps([reached, sorted(os.listdir(root))]))
    """
    reached, names = _run_script(_dedent(script), tmp_path)
    assert len(reached) == 10
    assert reached == sorted(set(reached))
    assert names == [f"step-{step:08d}" for step in (reached[-1], reached[-1] + 1)]


@pytest.mark.parametrize("same_step", [False, True], ids=["next step", "same step again"])
def test_a_kill_before_each_system_call_leaves_a_whole_checkpoint(tmp_path: Path, same_step: bool):
    """The writer kills itself at its n-th call of what changes the disk, for every n that there is."""
    script = """
    new = 2 if sys.argv[2] == "True" else 3
    survived, calls = [], 0
    while True:
        calls += 1
        place = root / str(calls)
        for step in (1, 2):
            checkpoint.save(place, step, tree(step))

        def save_and_die():
            left = calls
            def dying(call):
                def counted(*arguments, **options):
                    nonlocal left
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **options)
                return counted
            for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "chmod", "close"):
                setattr(os, name, dying(getattr(os, name)))
            checkpoint.save(place, new, tree(new))

        status = os.waitpid(forked(save_and_die), 0)[1]
        found = checkpoint.load(place)
        check(found)
        assert checkpoint.latest(place) == found.path
        survived.append(found.step)
        checkpoint.save(place, 4, tree(4), keep_last=9)
        names = set(os.listdir(place))
        assert names <= {f"step-{step:08d}" for step in (1, 2, new, 4)}, names
        if not os.WIFSIGNALED(status):
            break
    print(json.dumps([survived, calls]))
    """
    survived, calls = _run_script(_dedent(script), tmp_path, same_step)
    assert calls > 15
    assert survived == sorted(survived)
    assert survived[-1] == (2 if same_step else 3)


# ---------------------------------------------------------------- directories and files


def test_a_directory_appears_whole_and_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "sub" / "dictionary"
    for take in ("first", "second"):
        with write_directory(target) as directory:
            (directory / "nested").mkdir()
            (directory / "nested" / "file").write_text(take)
            assert not target.exists() or (target / "nested" / "file").read_text() == "first"
        assert (target / "nested" / "file").read_text() == take
    assert _names(target.parent) == ["dictionary"]


def test_a_failed_block_leaves_the_old_directory(tmp_path: Path):
    with write_directory(tmp_path / "d") as directory:
        (directory / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), write_directory(tmp_path / "d") as directory:  # noqa: PT012
        (directory / "file").write_text("new")
        raise KeyboardInterrupt
    assert _names(tmp_path) == ["d"]
    assert (tmp_path / "d" / "file").read_text() == "old"


def test_files_of_others_are_not_swept_away(tmp_path: Path):
    target = tmp_path / "home"
    target.mkdir()
    with write_directory(target) as directory:  # an empty directory may be taken
        (directory / "cfg.json").write_text("{}")
    (target / "thesis.tex").write_text("years")
    with (
        pytest.raises(TrimtabError, match=r"holds cfg\.json, thesis\.tex, which replacing it would delete"),
        write_directory(target),
    ):
        pass
    assert (target / "thesis.tex").read_text() == "years"
    with pytest.raises(TrimtabError, match="is a file"), write_directory(target / "cfg.json"):
        pass
    assert _names(tmp_path) == ["home"]


def test_a_failed_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "d").mkdir()
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), write_directory(tmp_path / "d"):
        pass
    assert _names(tmp_path) == ["d"]


def test_a_linked_directory_is_replaced_where_it_is(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with write_directory(tmp_path / "link") as directory:
        (directory / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "x"


def test_what_a_killed_writer_left_is_put_right(tmp_path: Path):
    (tmp_path / "d.tmp-77").mkdir()
    (tmp_path / "d.old-77").mkdir()
    (tmp_path / "d.old-77" / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), write_directory(tmp_path / "d"):
        raise ZeroDivisionError
    assert _names(tmp_path) == ["d"]
    assert (tmp_path / "d" / "file").read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path: Path):
    usual = tmp_path / "usual"
    usual.write_text("")
    path = save(tmp_path, 1, {"w": torch.zeros(2)})
    modes = {file.stat().st_mode for file in [usual, *path.iterdir()]}
    assert len(modes) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sub" / "file.json"
    write_file(path, b"old")
    (path.parent / "file.json.tmp-99999999").write_bytes(b"half")
    write_file(path, b"new")
    assert _names(path.parent) == ["file.json"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"newer")
    assert _names(path.parent) == ["file.json"]
    assert path.read_bytes() == b"new"


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, {})

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="could not be deleted"):
        save(tmp_path, 2, {}, keep_last=1)
    assert load(tmp_path).step == 2
