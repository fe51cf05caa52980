"""Training on two processes equals training on one with the same global batches, whichever way they share it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.core import checkpoint
from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.micro import micro_model
from trimtab.gallery.testbeds.text import ENGLISH
from trimtab.sae import DictionaryConfig, TensorShards, TopKSAE, TrainingConfig, train
from trimtab.sae import trainer as trainer_module
from trimtab.sae.shuffle import ShuffledActivations

pytestmark = pytest.mark.distributed

PROGRAM = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_two_processes import dictionaries, rows, settings
from trimtab.sae import TensorShards, train
torch.set_num_threads(1)
out, shards, base = sys.argv[1], int(sys.argv[2]), sys.argv[3]
train(dictionaries(base), TensorShards(rows(), shard_rows=100), settings(tensor_parallel=shards), out)
assert dist.is_initialized() and dist.get_world_size() == 2, "one process ran alone"
sys.stdout.write(f"world size {{dist.get_world_size()}}\\n")  # in one piece: both write to one pipe
dist.destroy_process_group()
"""


BYTES = """
import os, sys, torch
from pathlib import Path
from accelerate import Accelerator
from trimtab.sae import DictionaryConfig, TrainingConfig
from trimtab.sae.learner import Learner
from trimtab.sae.parallel import mesh
torch.set_num_threads(1)
accelerator, x = Accelerator(cpu=True), torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
processes = mesh(accelerator.num_processes, accelerator.num_processes, "cpu")
for name, kron in (("dense", None), ("kron", (2, 4))):
    config = DictionaryConfig(place="x", n_latents=512, k=4, kron=kron)
    learner = Learner.begin(config, TrainingConfig(tokens=256, batch_size=256), {"x": x}, x.device, processes)
    learner.step({"x": x}, 1e-3, 0)
    moments = [value for each in learner.optimizer.state.values() for value in each.values()]
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*learner.weights, *learner.gradients, *moments))
    if accelerator.is_main_process:
        Path(sys.argv[1], f"{name}-{accelerator.num_processes}").write_text(str(held))
sys.stdout.write(f"world size {accelerator.num_processes}\\n")
accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # gloo's threads may outlive the process group, and abort an orderly exit
"""


def dictionaries(base: Path | str) -> list[DictionaryConfig]:
    return [
        DictionaryConfig(place="x", n_latents=48, k=4),
        DictionaryConfig(place="x", target="y", n_latents=32, k=4),
        DictionaryConfig(place="x", n_latents=48, k=4, kron=(2, 4), objective="hierarchical"),
        DictionaryConfig(place="x", n_latents=48, k=6, objective="hierarchical", budgets=(1, 2, 6)),
        DictionaryConfig(place="x", n_latents=48, k=4, objective="multi_topk"),
        DictionaryConfig(place="x", n_latents=48, k=4, sparsifier="batch_topk"),
        DictionaryConfig(
            place="x", n_latents=40, k=4, sparsifier="batch_topk", objective="matryoshka", budgets=(10, 25, 40)
        ),
        DictionaryConfig(place="x", n_latents=16, k=2, base=str(base)),
        DictionaryConfig(place="x", n_latents=16, k=2, base=str(base), encoder_input="error", freeze_decoder=True),
        DictionaryConfig(place="x", n_latents=40, k=5, sparsifier="batch_topk", extend=str(base)),
        DictionaryConfig(place="x", n_latents=48, k=4, sparsifier="jumprelu"),
    ]


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 16, generator=generator) * 5 + 1
    return {"x": x, "y": x @ torch.randn(16, 9, generator=generator)}


def settings(**options: Any) -> TrainingConfig:
    """AuxK is in play: latents count as dead after three batches without firing."""
    return TrainingConfig(
        tokens=1600, batch_size=40, learning_rate=4e-3, dead_after=120, checkpoint_every=10, log_every=1, **options
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary for others to add to."""
    directory = tmp_path_factory.mktemp("base")
    short = TrainingConfig(tokens=400, batch_size=40, learning_rate=4e-3)
    train([DictionaryConfig(place="x", n_latents=24, k=3)], TensorShards(rows()), short, directory)
    return directory / "x"


class _BothRanks:
    """The batches of two ranks, put together: what two processes see in one step."""

    def __init__(self, shards: TensorShards, *, batch_size: int, seed: int, rank: int, world: int) -> None:
        self._ranks = [
            ShuffledActivations(shards, batch_size=batch_size // 2, seed=seed, rank=r, world=2) for r in (0, 1)
        ]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        first, second = (next(rank) for rank in self._ranks)
        return {place: torch.cat([first[place], second[place]]) for place in first}

    def peek(self) -> dict[str, Tensor]:
        return self._ranks[0].peek()

    def state_dict(self) -> dict[str, Any]:
        return {}


def torchrun(out: Path, base: Path, shards: int = 1) -> str:
    script = out.parent / f"{out.name}.py"
    script.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    return run(script, 2, str(out), str(shards), str(base))


def run(script: Path | str, world: int, *arguments: str) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    done = subprocess.run(
        [*launch, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_the_last_checkpoint(run: Path, copy: Path) -> Path:
    """A copy of a run that was stopped after three quarters of it."""
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    shutil.rmtree(sorted((copy / "checkpoints").iterdir())[-1])
    return copy


def assert_equal_runs(found: Path, wanted: Path, **tolerance: float) -> None:
    """Loss curves and weights of every dictionary."""
    curves, expected = (json.loads((run / "history.json").read_text()) for run in (found, wanted))
    assert len(curves) == len(expected) == 40
    names = list(expected[0]["dictionaries"])
    assert len(names) == 11
    for mine, theirs in zip(curves, expected, strict=True):
        for name in names:
            for key in ("loss", "aux_loss", "l0", "dead_fraction"):
                other = theirs["dictionaries"][name][key]
                assert mine["dictionaries"][name][key] == pytest.approx(other, rel=2e-3, abs=1e-3), (name, key)
    for name in names:
        wanted_weights = load_file(wanted / name / "sae_weights.safetensors")
        found_weights = load_file(found / name / "sae_weights.safetensors")
        for key, value in wanted_weights.items():
            torch.testing.assert_close(found_weights[key], value, **tolerance, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[int, Path]:
    """The run of two processes, by the number of shards: gradients averaged, and each dictionary in two parts."""
    out = tmp_path_factory.mktemp("two")
    for shards in (1, 2):
        assert torchrun(out / f"shards-{shards}", base, shards).count("world size 2") == 2
    return {shards: out / f"shards-{shards}" for shards in (1, 2)}


@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_equal_one_with_the_same_global_batches(
    tmp_path: Path, two: dict[int, Path], base: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "ShuffledActivations", _BothRanks)
    train(dictionaries(base), TensorShards(rows(), shard_rows=100), settings(), tmp_path)
    curve = json.loads((tmp_path / "history.json").read_text())
    assert any(entry["dictionaries"]["x-n48-k4-s0"]["aux_loss"] > 0 for entry in curve), "AuxK never acted"
    assert_equal_runs(two[shards], tmp_path, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_resume_with_equal_weights(tmp_path: Path, two: dict[int, Path], base: Path, shards: int) -> None:
    again = without_the_last_checkpoint(two[shards], tmp_path / "again")
    torchrun(again, base, shards)
    assert_equal_runs(again, two[shards], rtol=0, atol=0)


def test_a_run_goes_on_in_another_layout(tmp_path: Path, two: dict[int, Path], base: Path) -> None:
    again = without_the_last_checkpoint(two[1], tmp_path / "again")
    torchrun(again, base, 2)
    assert_equal_runs(again, two[1], rtol=1e-3, atol=1e-3)


def test_one_process_goes_on_with_a_run_of_two(
    tmp_path: Path, two: dict[int, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the weights of the two, with shards of activations that neither of them has touched."""
    again = without_the_last_checkpoint(two[2], tmp_path / "again")
    asked: list[int] = []

    class Watched(TensorShards):
        def shard(self, index: int) -> dict[str, Tensor]:
            asked.append(index)
            return super().shard(index)

    state = checkpoint.load(again / "checkpoints").tree
    touched = 2 * (max(position["round"] for position in state["activations"]) + 1)
    train(dictionaries(base), Watched(rows(), shard_rows=100), settings(), again)
    assert min(asked) == touched
    curve = json.loads((again / "history.json").read_text())
    before = json.loads((two[2] / "history.json").read_text())
    assert curve[:30] == before[:30]
    for name in before[0]["dictionaries"]:
        late = [sum(entry["dictionaries"][name]["loss"] for entry in run[30:]) for run in (curve, before)]
        assert late[0] == pytest.approx(late[1], rel=0.1), "other rows, the same dictionary"


def test_bytes_of_a_process_fall_with_the_processes_that_share_a_dictionary(tmp_path: Path) -> None:
    """Parameters, gradients and moments, of every kind of encoder."""
    script = tmp_path / "bytes.py"
    script.write_text(BYTES)
    for world in (1, 2, 4):
        assert run(script, world, str(tmp_path)).count(f"world size {world}") == world
    for name in ("dense", "kron"):
        whole = int((tmp_path / f"{name}-1").read_text())
        for world in (2, 4):
            assert int((tmp_path / f"{name}-{world}").read_text()) == pytest.approx(whole / world, rel=0.05)


def test_the_command_line_on_two_processes(tmp_path: Path) -> None:
    """A live harvest of which each process has its share, cached; the first alone speaks."""
    text = tmp_path / "text.txt"
    text.write_text(ENGLISH.read_text("utf-8")[:100_000], encoding="utf-8")
    options = {
        "model": micro_model("micro-llama"),
        "text": text,
        "places": "resid.1",
        "n_latents": 64,
        "k": 4,
        "tokens": 2048,
        "batch_size": 256,
        "shard_tokens": 1024,
        "tensor_parallel": 2,
        "cache": tmp_path / "cache",
        "out": tmp_path / "out",
    }
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    said = run("-m", 2, "trimtab.cli", "sae", "train", *command)
    assert said.count("dictionary") == 1
    assert {0, 1} <= {int(path.stem.split("-")[1]) % 2 for path in (tmp_path / "cache").glob("shard-*")}
    assert TopKSAE.from_pretrained(tmp_path / "out" / "resid.1").config.n_latents == 64


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="tensor_parallel=2 does not divide the 1 processes"):
        train(
            [DictionaryConfig(place="x", n_latents=48, k=4)],
            TensorShards(rows()),
            settings(tensor_parallel=2),
            tmp_path,
        )
