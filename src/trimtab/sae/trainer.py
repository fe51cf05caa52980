"""Training dictionaries: a loop on accelerate around the closed-form step of `trimtab.sae.functional`.

Several dictionaries (places, sizes, k, seeds) learn from the same batches, so that the language model runs once. The
run lives in a directory:

    OUT/resid.9/…               each finished dictionary, in SAELens's format
    OUT/checkpoints/step-…      whole checkpoints; a killed run goes on from the last, bit for bit at equal thread count
    OUT/history.json            what was logged

With several processes (torchrun, accelerate launch) each harvests its share of every batch; gradients are averaged.
With `tensor_parallel`, so many processes hold each dictionary together (`trimtab.sae.parallel`). A run may be taken up
by another number of processes: weights and moments are the same, and the text goes on with shards that none has seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

import trimtab
from trimtab.core import checkpoint
from trimtab.core.activations import tl_hook_name
from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.interrupts import Interruptible
from trimtab.core.progress import Progress
from trimtab.core.schedules import warmup_cosine
from trimtab.sae import formats
from trimtab.sae.boosted import other_origin, weights_digest
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.harvest import ShardSource
from trimtab.sae.learner import Learner
from trimtab.sae.modeling import TopKSAE
from trimtab.sae.parallel import mesh
from trimtab.sae.shuffle import ShuffledActivations

__all__ = ["dictionary_names", "train"]


def train(
    dictionaries: Sequence[DictionaryConfig],
    shards: ShardSource,
    config: TrainingConfig,
    out: Path | str,
    *,
    accelerator: Accelerator | None = None,
    allow_previous: bool = False,
) -> dict[str, TopKSAE]:
    """Train `dictionaries` on `shards` and write them under `out`; returns them by the name of their directory.

    If `out` holds checkpoints of this very run, it goes on from the last one; of another run, it is refused. On Ctrl-C
    a checkpoint is written before KeyboardInterrupt is raised.

    allow_previous: where the last checkpoint is damaged, use the one before it, with a warning.
    Raises TrimtabError for dictionaries of unknown places, and for NaN or infinity in activations, loss or gradient:
    the message names the step, and the last good checkpoint stays.
    """
    out = Path(out)
    accelerator = accelerator or _accelerator(config, out)
    run = _Run(dictionaries, shards, config, out, accelerator)
    run.resume(allow_previous)
    with (
        Interruptible() as guard,
        Progress("training", config.steps * config.batch_size, "tokens", done=run.step * config.batch_size) as bar,
    ):
        try:
            while run.step < config.steps:
                batch = next(run.activations)
                with guard.whole():
                    run.train_step(batch)
                    bar.advance(config.batch_size, run.summary())
                    if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                        run.save()
        except KeyboardInterrupt:
            if accelerator.num_processes == 1:  # others may be in a step that this process has not begun
                run.save()
            raise
    return run.finish()


def dictionary_names(dictionaries: Sequence[DictionaryConfig], places: Sequence[str]) -> list[str]:
    """Directory names: the place, with size, k, seed and kind where the place alone would not tell them apart.

    Raises TrimtabError for none, for two of one name, and for a dictionary of something else than `places`.
    """
    if not dictionaries:
        raise TrimtabError("dictionaries=[] leaves nothing to train; give at least one")
    for place in (place for dictionary in dictionaries for place in dictionary.places):
        if place not in places:
            raise unknown("place", place, places)
    names: list[str] = []
    for dictionary in dictionaries:
        name = "-to-".join(dictionary.places)
        if sum(other.places == dictionary.places for other in dictionaries) > 1:
            name += f"-n{dictionary.n_latents}-k{dictionary.k}-s{dictionary.seed}"
            if dictionary.kron is not None:
                name += f"-kron{dictionary.kron[0]}x{dictionary.kron[1]}"
            if dictionary.base is not None:
                name += "-boost"
            elif dictionary.extend is not None:
                name += "-extended"
            elif dictionary.sparsifier != "topk":
                name += f"-{dictionary.sparsifier}"
            if dictionary.objective != "reconstruction":
                name += f"-{dictionary.objective}"
        if dictionary in dictionaries[: len(names)]:
            raise TrimtabError(f"dictionaries hold {name!r} twice; they must differ in some field")
        same = sum(other == name or other.startswith(f"{name}-alt") for other in names)
        names.append(f"{name}-alt{same}" if same else name)
    return names


def _accelerator(config: TrainingConfig, out: Path) -> Accelerator:
    """On a GPU if there is one, else on the CPU (sparse products are not there on other devices), with trackers."""
    have = [getattr(tracker, "value", tracker) for tracker in get_available_trackers()]
    for tracker in config.report_to:
        if tracker not in have:
            raise TrimtabError(
                f"report_to={tracker!r} is not a tracker that is installed here; accepted: {', '.join(have) or 'none'}"
            )
    return Accelerator(cpu=not torch.cuda.is_available(), log_with=list(config.report_to) or None, project_dir=str(out))


def _check_memory(dictionaries: Sequence[DictionaryConfig], rows: Mapping[str, Tensor], shards: int) -> None:
    """Refuse dictionaries whose weights, gradients and optimiser would not fit, before anything is allocated."""
    available, total = psutil.virtual_memory().available, 0.0
    for dictionary in dictionaries:
        m, n = dictionary.kron or (1, 0)
        width = rows[dictionary.place].shape[1] * (m + n) / (m * n or 1) + rows[dictionary.output].shape[1]
        whole = 4 * (shards > 1)  # the initial weights, before they are cut
        total += (16 / shards + whole) * dictionary.n_latents * width
        if total > available and rows[dictionary.place].device.type == "cpu":
            raise TrimtabError(
                f"n_latents={dictionary.n_latents} needs {total / 2**30:,.1f} GiB in training, with those before it; "
                f"{available / 2**30:,.1f} GiB are free"
            )


class _Run:
    """The whole of a training run's state, and its way to disk and back."""

    def __init__(
        self,
        dictionaries: Sequence[DictionaryConfig],
        shards: ShardSource,
        config: TrainingConfig,
        out: Path,
        accelerator: Accelerator,
    ) -> None:
        self.names = dictionary_names(dictionaries, shards.places)
        world = accelerator.num_processes
        if config.batch_size % world:
            raise TrimtabError(f"batch_size={config.batch_size} must be a multiple of the {world} processes")
        self.config, self.out, self.accelerator, self.shards = config, out, accelerator, shards
        self.processes = mesh(world, config.tensor_parallel, accelerator.device.type)
        self.activations = ShuffledActivations(
            shards,
            batch_size=config.batch_size // world,
            seed=config.seed,
            rank=accelerator.process_index,
            world=world,
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._configs = list(dictionaries)
        self.learners: list[Learner]
        without = ("checkpoint_every", "keep_last", "report_to", "tensor_parallel")
        training = {k: v for k, v in asdict(config).items() if k not in without}
        self.identity = {
            "dictionaries": {name: asdict(d) for name, d in zip(self.names, dictionaries, strict=True)},
            "training": training,
            "activations": shards.identity,
        }
        frozen = {directory: d for d in dictionaries for directory in (d.base, d.extend) if directory is not None}
        bases = {directory: self._digest_of_base(directory, d) for directory, d in frozen.items()}
        self.identity |= {"bases": bases} if bases else {}

    def _digest_of_base(self, directory: str, dictionary: DictionaryConfig) -> str:
        """A checksum of its weights: another base makes another run. Refuses that of another model."""
        base = TopKSAE.from_pretrained(directory)
        activations = self.shards.identity
        mine = {"model_name": activations.get("model"), "trimtab": {"activations": activations}}
        other = other_origin(base.config.metadata, mine)
        if other:
            name = "extend" if dictionary.base is None else "base"
            raise TrimtabError(f"{name}={directory!r} is of {other[0]}, dictionary {dictionary.place!r} of {other[1]}")
        return weights_digest(base)

    def resume(self, allow_previous: bool) -> None:
        """Take up the last checkpoint of `out`, or begin."""
        root = self.out / "checkpoints"
        fresh = [checkpoint.latest(root) is None]
        if self.processes.world > 1:
            broadcast_object_list(fresh)
        if fresh[0]:
            if self.accelerator.is_main_process:
                checkpoint.write_file(self.out / "run.json", json.dumps(self.identity, indent=2).encode())
            rows = self._rows_of_the_first()
            _check_memory(self._configs, rows, self.config.tensor_parallel)
            device = self.accelerator.device
            self.learners = [Learner.begin(d, self.config, rows, device, self.processes) for d in self._configs]
            self._agree()
        else:
            state = checkpoint.load(root, allow_previous=allow_previous, expect=self.identity).tree
            self.step, self.history = state["step"], state["history"]
            positions = state["activations"]
            if len(positions) == self.accelerator.num_processes:
                self.activations.load_state_dict(positions[self.accelerator.process_index])
            else:
                self.activations.go_on_after(positions)
            self.learners = [
                Learner.resume(d, self.config, state["dictionaries"][name], self.accelerator.device, self.processes)
                for d, name in zip(self._configs, self.names, strict=True)
            ]
            checkpoint.set_rng_state(state["rng"])
        self._position = self.activations.state_dict()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("trimtab-sae", config={"run": json.dumps(self.identity)})

    def _rows_of_the_first(self) -> dict[str, Tensor]:
        """The activations that scales are measured on: those of the first process, for all."""
        rows = {place: states.to(self.accelerator.device) for place, states in self.activations.peek().items()}
        shapes = [{place: list(states.shape) for place, states in rows.items()}]
        if self.processes.world > 1:
            broadcast_object_list(shapes)
        if not self.accelerator.is_main_process:
            rows = {place: rows[place].new_empty(shape) for place, shape in shapes[0].items()}
        return {place: self.processes.from_first(states.contiguous()) for place, states in rows.items()}

    def _agree(self) -> None:
        """Every group starts from the weights of the first, and all from the same scales, bit for bit."""
        for dictionary in self.learners:
            own = dictionary.weights[:3]
            for weight in own if dictionary.thresholds is None else (*own, dictionary.thresholds.log.data):
                self.processes.from_first_group(weight)
            self.processes.from_first(dictionary.weights.decoder_bias)
            self.processes.from_first(dictionary.input_mean)
            if self.processes.world > 1:
                scales = [dictionary.input_scale, dictionary.output_scale]
                dictionary.input_scale, dictionary.output_scale = broadcast_object_list(scales)

    def train_step(self, batch: Mapping[str, Tensor]) -> None:
        """One step of every dictionary; afterwards `step` counts it."""
        config = self.config
        floor = config.final_learning_rate / config.learning_rate
        learning_rate = config.learning_rate * warmup_cosine(self.step, config.steps, config.warmup, floor)
        batch = {place: self.processes.gathered(rows.to(self.accelerator.device)) for place, rows in batch.items()}
        for dictionary in self.learners:
            dictionary.step(batch, learning_rate, self.step)
        self.step += 1
        self._position = self.activations.state_dict()
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._log(learning_rate)

    def _log(self, learning_rate: float) -> None:
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "learning_rate": learning_rate,
            "dictionaries": {name: d.losses for name, d in zip(self.names, self.learners, strict=True)},
        }
        self.history.append(entry)
        if self.accelerator.log_with:
            values = {f"{name}/{key}": v for name, row in entry["dictionaries"].items() for key, v in row.items()}
            self.accelerator.log({"learning_rate": learning_rate, **values}, step=self.step)

    def summary(self) -> str:
        """A few words on the first dictionary, for the progress bar."""
        losses = self.learners[0].losses
        return f"{self.names[0]}: loss {losses['loss']:.4f}, dead {losses['dead_fraction']:.1%}"

    def save(self) -> None:
        """Write a checkpoint; the first process does, with the data position of each after the last whole step."""
        positions = gather_object([self._position])
        dictionaries = {name: d.state() for name, d in zip(self.names, self.learners, strict=True)}
        if not self.accelerator.is_main_process:
            return
        tree = {
            "step": self.step,
            "history": self.history,
            "activations": positions,
            "dictionaries": dictionaries,
            "rng": checkpoint.rng_state(),
        }
        root = self.out / "checkpoints"
        checkpoint.save(root, self.step, tree, identity=self.identity, keep_last=self.config.keep_last)

    def finish(self) -> dict[str, TopKSAE]:
        """Write the finished dictionaries and the history; give the dictionaries."""
        finished = {}
        for name, dictionary in zip(self.names, self.learners, strict=True):
            finished[name] = dictionary.finished(self._metadata(dictionary))
            fired = self.processes.whole(dictionary.fired)
            if self.accelerator.is_main_process and not _is_there(finished[name], self.out / name):
                rate = fired.double() / (self.step * self.config.batch_size)
                with checkpoint.write_directory(self.out / name) as directory:
                    formats.write_saelens(finished[name], directory, sparsity=rate.clamp_min(1e-10).log10().float())
                    formats.model_card(finished[name]).save(directory / "README.md")
        if self.accelerator.is_main_process:
            checkpoint.write_file(self.out / "history.json", json.dumps(self.history).encode())
        if self.accelerator.log_with:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()  # nobody returns before the files are there
        return finished

    def _metadata(self, dictionary: Learner) -> dict[str, Any]:
        """What SAELens calls metadata: its own keys where they apply, and everything of ours under `trimtab`."""
        activations = self.identity["activations"]
        place = dictionary.config.place
        ours = {
            "version": trimtab.__version__,
            "place": place,
            "target": dictionary.config.target,
            "dictionary": asdict(dictionary.config),
            "activations": activations,
            "training": self.identity["training"],
            "final": dictionary.losses,
        }
        if dictionary.config.base is not None:
            ours["base_sha256"] = self.identity["bases"][dictionary.config.base]
        metadata: dict[str, Any] = {"trimtab": json.loads(json.dumps(ours))}
        if "model" in activations:
            metadata |= {
                "model_name": activations["model"],
                "hook_name": tl_hook_name(place),
                "context_size": activations["harvest"]["context"],
                "prepend_bos": activations["prepend_bos"],
            }
        return metadata


def _is_there(sae: TopKSAE, directory: Path) -> bool:
    """Whether `directory` holds these very weights; then it stays, with what was measured of them beside."""
    if not (directory / "cfg.json").exists():
        return False
    found, wanted = formats.read_saelens(directory).state_dict(), sae.state_dict()
    return found.keys() == wanted.keys() and all(
        found[name].shape == weight.shape and found[name].equal(weight.cpu()) for name, weight in wanted.items()
    )
