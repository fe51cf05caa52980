"""What a training run would cost, measured on a few passes and steps of the run itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.harvest import Harvest
from trimtab.sae.kernels import BLOCK_ELEMENTS
from trimtab.sae.learner import Learner
from trimtab.sae.trainer import dictionary_names

__all__ = ["Plan", "plan"]

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Seconds, bytes of memory and bytes of disk of a run; `str()` is what `--dry_run` prints."""

    names: tuple[str, ...]
    tokens: int
    harvest_seconds: float
    training_seconds: float
    memory_bytes: int
    output_bytes: int
    checkpoint_bytes: int
    cache_bytes: int

    def __str__(self) -> str:
        minutes = (self.harvest_seconds + self.training_seconds) / 60
        disk = self.output_bytes + self.checkpoint_bytes + self.cache_bytes
        return "\n".join(
            [
                f"would train {len(self.names)} dictionaries ({', '.join(self.names)}) on {self.tokens:,} tokens:",
                f"  time    {minutes:.1f} min: {self.harvest_seconds / 60:.1f} of the language model, "
                f"{self.training_seconds / 60:.1f} of training",
                f"  memory  {self.memory_bytes / MIB:,.0f} MiB: models, dictionaries in training, shards",
                f"  disk    {disk / MIB:,.0f} MiB: dictionaries {self.output_bytes / MIB:,.0f}, checkpoints "
                f"{self.checkpoint_bytes / MIB:,.0f}, cached activations {self.cache_bytes / MIB:,.0f}",
            ]
        )


def plan(dictionaries: Sequence[DictionaryConfig], harvest: Harvest, training: TrainingConfig, *, cached: bool) -> Plan:
    """Estimate the run of `dictionaries` on `harvest`, from two forward passes and two steps; nothing is written."""
    names = dictionary_names(dictionaries, harvest.places)
    forwards = iter(harvest.forwards(sequences=3 * harvest.config.sequences_per_forward, repeat=True))
    first = next(forwards)
    tokens_of_pass = first.input_ids.numel()
    harvest_seconds = min(_seconds(lambda: next(forwards)) for _ in range(2)) * training.tokens / tokens_of_pass
    rows = {place: states[first.keep].float() for place, states in first.activations.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learners = [Learner.begin(dictionary, training, rows, device) for dictionary in dictionaries]
    seconds_of_step = _seconds_of_step(learners, rows, training.batch_size)
    weights = [sum(weight.nbytes for weight in learner.weights) for learner in learners]
    row_bytes = sum(states[first.keep][:1].nbytes for states in first.activations.values())
    frozen = [harvest.model, *(learner.base for learner in learners if learner.base is not None)]
    frozen_bytes = sum(p.nbytes for module in frozen for p in module.parameters())
    return Plan(
        names=tuple(names),
        tokens=training.steps * training.batch_size,
        harvest_seconds=harvest_seconds,
        training_seconds=seconds_of_step * training.steps,
        memory_bytes=frozen_bytes
        + 4 * sum(weights)
        + 6 * harvest.config.shard_tokens * row_bytes
        + 4 * max(BLOCK_ELEMENTS, max(d.n_latents for d in dictionaries)),
        output_bytes=sum(weights) + 4 * sum(d.n_latents for d in dictionaries),  # the latter: firing frequencies
        checkpoint_bytes=3 * sum(weights) * training.keep_last,
        cache_bytes=training.tokens * row_bytes if cached else 0,
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _seconds_of_step(learners: Sequence[Learner], rows: Mapping[str, Tensor], batch_size: int) -> float:
    """Seconds of one step of all `learners` on `rows`, repeated to a batch: the faster of two, after another."""
    length = len(next(iter(rows.values())))
    batch = {place: states[torch.arange(batch_size) % length] for place, states in rows.items()}

    def step() -> None:
        for learner in learners:
            learner.step(batch, 0.0, 0)

    step()
    return min(_seconds(step) for _ in range(2))
