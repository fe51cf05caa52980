"""One arm of `sae_training`, in a process of its own: a trainer as its users run it, given one batch after another.

Runs in our environment or in the peers' and so imports nothing of ours at its head. Talks with `sae_training` in JSON
lines: for each line on its standard input it trains one round and says {"wall", "cpu", "peak"}; after the last round it
says {"explained_variance", "dead", "version"}. Whatever else is printed goes to the standard error.

A step's time runs from the moment its batch is handed over until the next one is asked for, so that all that a trainer
does for a step counts, and fetching rows, which all arms do alike, does not.

The arms: trimtab and trimtab-screened are `Learner.step`. saelens and saelens-sparse are SAELens's SAETrainer with a
TopKTrainingSAE, dense and with sparse activations; there its default, to rescale activations by the decoder's norm, is
off, since the two together fail in the backward pass. sparsify is sparsify's Trainer, whose language model is a stub
that hands out rows, with the schedule-free sign descent that is its default; sparsify-adam is the same with Adam.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Setting", "main"]

ALPHA = 1 / 32
"""Weight of AuxK in ours and in sparsify."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an arm is told.

    rows: a safetensors file with "train" and "held_out" [rows, d_model], centred and scaled.
    steps: of the whole run, for the schedule: a tenth of warm-up, then a decay. rounds: how many rounds of
        `steps_per_round` steps are in fact trained.
    dead_after: steps without firing after which a latent is dead.
    """

    arm: str
    rows: str
    learning_rate: float
    n_latents: int = 16_384
    k: int = 32
    batch_size: int = 2_048
    steps: int = 117
    steps_per_round: int = 9
    rounds: int = 13
    dead_after: int = 12
    seed: int = 0
    threads: int = 2

    @property
    def warmup_steps(self) -> int:
        return round(self.steps / 10)

    def command_line(self, python: Path | str) -> list[str]:
        """What starts the arm, from the repository's root."""
        return [str(python), "-m", "benchmarks.sae_arms", json.dumps(asdict(self))]


class Trained(NamedTuple):
    """A reconstruction of rows, the share of dead latents, and which release trained it."""

    reconstruct: Callable[[Tensor], Tensor]
    dead: float
    version: str


class Finished(Exception):  # noqa: N818 - no error: how a trainer that would go on is told that it is enough
    """Raised in place of a batch after the last round."""


def main(setting: Setting) -> None:
    """Train in rounds, as told on standard input; then evaluate."""
    talk = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(setting.threads)
    rows = {name: tensor.clone() for name, tensor in load_file(setting.rows).items()}  # memory, not pages of the file
    train = _ARMS[setting.arm]()
    _load_optimisers()
    torch.manual_seed(setting.seed)
    baseline = _reset_peak()
    trained = train(rows["train"], _batches(rows["train"], setting, talk, baseline), setting)
    with torch.no_grad():
        held_out = rows["held_out"]
        errors = [(part - trained.reconstruct(part)).square().sum() for part in held_out.split(setting.batch_size)]
        variance = (held_out - held_out.mean(0)).square().sum()
        explained = 1 - (sum(errors) / variance).item()
    print(json.dumps({"explained_variance": explained, "dead": trained.dead, "version": trained.version}), file=talk)


def _batches(rows: Tensor, setting: Setting, talk: TextIO, baseline: int) -> Iterator[Tensor]:
    parts = iter(rows.split(setting.batch_size))
    for _ in range(setting.rounds):
        if not sys.stdin.readline():
            sys.exit("nobody is listening any more")
        wall, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(setting.steps_per_round):
            yield next(parts)
        taken = {"wall": time.perf_counter() - wall, "cpu": _cpu_seconds() - cpu}
        print(json.dumps(taken | {"peak": _memory("VmHWM") - baseline}), file=talk)
    raise Finished


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _reset_peak() -> int:
    """Forget the largest memory so far; the memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: Literal["VmHWM", "VmRSS"]) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _load_optimisers() -> None:
    """The first optimiser of a process imports half of PyTorch, which is no arm's memory."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()


# -- the arms: each imports what it needs, then gives a function that trains -------------------------

Train = Callable[["Tensor", Iterator["Tensor"], Setting], Trained]


def _trimtab(precision: Literal["float32", "screened"]) -> Train:
    import trimtab
    from trimtab.core.schedules import warmup_cosine
    from trimtab.sae.config import DictionaryConfig, TrainingConfig
    from trimtab.sae.learner import Learner

    place, floor = "resid.9", 1e-6

    def train(rows: Tensor, batches: Iterator[Tensor], setting: Setting) -> Trained:
        dictionary = DictionaryConfig(place=place, n_latents=setting.n_latents, k=setting.k, seed=setting.seed)
        training = TrainingConfig(
            tokens=setting.steps * setting.batch_size,
            batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            alpha=ALPHA,
            dead_after=setting.dead_after * setting.batch_size,
            precision=precision,
        )
        learner = Learner.begin(dictionary, training, {place: rows[:16_384]}, rows.device)
        with suppress(Finished):
            for step, batch in enumerate(batches):
                share = warmup_cosine(step, setting.steps, training.warmup, floor / setting.learning_rate)
                learner.step({place: batch}, setting.learning_rate * share, step)
        return Trained(learner.finished({}), learner.losses["dead_fraction"], trimtab.__version__)

    return train


def _saelens(use_sparse_activations: bool) -> Train:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def train(rows: Tensor, batches: Iterator[Tensor], setting: Setting) -> Trained:
        config = TopKTrainingSAEConfig(
            d_in=rows.shape[1],
            d_sae=setting.n_latents,
            k=setting.k,
            use_sparse_activations=use_sparse_activations,
            rescale_acts_by_decoder_norm=not use_sparse_activations,
        )
        trainer_config = SAETrainerConfig(
            total_training_samples=(setting.steps + 1) * setting.batch_size,
            train_batch_size_samples=setting.batch_size,
            lr=setting.learning_rate,
            lr_end=1e-6,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=setting.warmup_steps,
            dead_feature_window=setting.dead_after - 1,
        )
        sae = TopKTrainingSAE(config)
        trainer = SAETrainer(trainer_config, sae, batches)
        with suppress(Finished):
            trainer.fit()
        dead = trainer.dead_neurons.float().mean().item()
        return Trained(sae.eval(), dead, f"sae-lens {importlib.metadata.version('sae-lens')}")

    return train


def _sparsify(optimizer: Literal["signum", "adam"]) -> Train:
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class HandsOutRows(torch.nn.Module):
        """What the trainer needs of a language model: its one block gives the next batch as a sequence."""

        device = torch.device("cpu")
        dummy_inputs: dict[str, Any] = {}  # noqa: RUF012 - as transformers has it

        def __init__(self, batches: Iterator[Tensor], width: int) -> None:
            super().__init__()
            self.block = torch.nn.Identity()
            self.batches, self.width = batches, width

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, input_ids: Tensor | None = None) -> Tensor:
            states = torch.zeros(1, 1, self.width) if input_ids is None else next(self.batches)[None]
            return self.block(states)

    def train(rows: Tensor, batches: Iterator[Tensor], setting: Setting) -> Trained:
        config = TrainConfig(
            sae=SparseCoderConfig(num_latents=setting.n_latents, k=setting.k),
            batch_size=1,
            hookpoints=["block"],
            optimizer=optimizer,
            lr=setting.learning_rate,
            lr_warmup_steps=setting.warmup_steps,
            auxk_alpha=ALPHA,
            dead_feature_threshold=setting.dead_after * setting.batch_size - 1,
            init_seeds=[setting.seed],
            log_to_wandb=False,
        )
        sequence = {"input_ids": torch.zeros(setting.batch_size, dtype=torch.int64)}
        trainer = Trainer(config, [sequence] * (setting.steps + 1), HandsOutRows(batches, rows.shape[1]))
        with suppress(Finished):
            trainer.fit()
        for used in trainer.optimizers:
            if isinstance(used, ScheduleFreeWrapper):
                used.eval()  # its averaged weights, as the trainer saves them
        (sae,), (silent,) = trainer.saes.values(), trainer.num_tokens_since_fired.values()
        dead = (silent > config.dead_feature_threshold).float().mean().item()
        version = f"eai-sparsify {importlib.metadata.version('eai-sparsify')}"
        return Trained(lambda x: sae(x).sae_out, dead, version)

    return train


_ARMS: dict[str, Callable[[], Train]] = {
    "trimtab": lambda: _trimtab("float32"),
    "trimtab-screened": lambda: _trimtab("screened"),
    "saelens": lambda: _saelens(False),
    "saelens-sparse": lambda: _saelens(True),
    "sparsify": lambda: _sparsify("signum"),
    "sparsify-adam": lambda: _sparsify("adam"),
}

if __name__ == "__main__":
    main(Setting(**json.loads(sys.argv[1])))
