"""Training on two processes equals training on one with the same global batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.sae import DictionaryConfig, TensorShards, TrainingConfig, train
from trimtab.sae import trainer as trainer_module
from trimtab.sae.shuffle import ShuffledActivations

pytestmark = pytest.mark.distributed

PROGRAM = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_two_processes import DICTIONARIES, rows, settings
from trimtab.sae import TensorShards, train
torch.set_num_threads(1)
train(DICTIONARIES, TensorShards(rows(), shard_rows=100), settings(), sys.argv[1])
assert dist.is_initialized() and dist.get_world_size() == 2, "one process ran alone"
sys.stdout.write(f"world size {{dist.get_world_size()}}\\n")  # in one piece: both write to one pipe
dist.destroy_process_group()
"""

DICTIONARIES = [
    DictionaryConfig(place="x", n_latents=48, k=4),
    DictionaryConfig(place="x", target="y", n_latents=32, k=4),
    DictionaryConfig(place="x", n_latents=48, k=4, kron=(2, 4), objective="hierarchical"),
    DictionaryConfig(place="x", n_latents=48, k=4, sparsifier="jumprelu"),
]


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 16, generator=generator) * 5 + 1
    return {"x": x, "y": x @ torch.randn(16, 9, generator=generator)}


def settings() -> TrainingConfig:
    return TrainingConfig(tokens=1600, batch_size=40, learning_rate=4e-3, alpha=0.0, checkpoint_every=10)


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


def torchrun(out: Path) -> str:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    script = out.parent / f"{out.name}.py"
    script.write_text(program)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_equal_one_with_the_same_global_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun(tmp_path / "two").count("world size 2") == 2
    monkeypatch.setattr(trainer_module, "ShuffledActivations", _BothRanks)
    one = train(DICTIONARIES, TensorShards(rows(), shard_rows=100), settings(), tmp_path / "one")
    for name in one:
        found = load_file(tmp_path / "two" / name / "sae_weights.safetensors")
        wanted = load_file(tmp_path / "one" / name / "sae_weights.safetensors")
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_two_processes_resume_with_equal_weights(tmp_path: Path) -> None:
    torchrun(tmp_path / "whole")
    torchrun(tmp_path / "again")
    checkpoints = tmp_path / "again" / "checkpoints"
    newest = sorted(checkpoints.iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    torchrun(tmp_path / "again")
    for key, value in load_file(tmp_path / "whole" / "x-n48-k4-s0" / "sae_weights.safetensors").items():
        found = load_file(tmp_path / "again" / "x-n48-k4-s0" / "sae_weights.safetensors")[key]
        torch.testing.assert_close(found, value, rtol=0, atol=0)
