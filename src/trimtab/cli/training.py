"""What `trimtab align` and `trimtab distill` have in common: options of a TRL trainer, its run, and what it would take.

A run's directory:

    run.json               what the run is: the same options go on from the last checkpoint, others are refused
    checkpoints/           the Trainer's own; one that holds `complete.json` was written to its end
    model/                 the finished model, or its adapter, with the tokenizer
    history.json           what the trainer logged
    metrics.json           the summary; a run that has it is finished
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from trimtab.cli.models import Dtype
from trimtab.core.errors import TrimtabError
from trimtab.core.files import write_file
from trimtab.core.progress import Progress, console

__all__ = [
    "Plan",
    "TrainingSettings",
    "finished_metrics",
    "free_memory",
    "hosts_to_themselves",
    "lora_config",
    "optimiser_steps",
    "run_trainer",
    "seconds_per_step",
    "show_summary",
    "trl_arguments",
    "weight_bytes",
    "with_adapters",
]

MIB = 2**20
RUN = "run.json"
METRICS = "metrics.json"
COMPLETE = "complete.json"
UNOFFICIAL = frozenset({"checkpoint_every", "keep_last", "log_every", "report_to"})
"""Options that may differ when a run goes on: nothing that is learned depends on them."""

# transformers renamed it, and warns of the old name.
_CHECKPOINTING = next(
    field.name for field in dataclasses.fields(TrainingArguments) if field.name.endswith("_checkpointing")
)

Precision = Literal["mixed", "float32", "bfloat16"]
LearningRateSchedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the model is trained.

    Args:
        learning_rate: peak of AdamW
        learning_rate_warmup: steps in which the rate rises; below 1, a share of all steps
        learning_rate_schedule: what follows: linear or cosine to 0, or constant
        steps: optimiser steps; default: as many as `epochs` takes
        epochs: passes over the examples
        batch_size: examples that a process takes at once
        gradient_accumulation: such batches of an optimiser step
        grad_clip: largest norm of the gradient
        weight_decay: of AdamW
        precision: mixed (float32 weights, products in bfloat16), float32, or bfloat16 (weights and all); default: mixed
            where there is an accelerator, else float32
        gradient_checkpointing: keep few activations and compute the others again
        lora_rank: rank of LoRA adapters on all linear layers; 0: all weights are trained
        lora_alpha: their scale times the rank; default: twice the rank
        seed: of adapters, of the order of examples, and of what is sampled
        checkpoint_every: steps between checkpoints
        keep_last: checkpoints that stay
        log_every: steps between entries of the history
        report_to: trackers that the Trainer knows, such as tensorboard
    """

    learning_rate: float = 1e-6
    learning_rate_warmup: float = 0.1
    learning_rate_schedule: LearningRateSchedule = "linear"
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    grad_clip: float = 1.0
    weight_decay: float = 0.0
    precision: Precision | None = None
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    seed: int = 0
    checkpoint_every: int = 100
    keep_last: int = 2
    log_every: int = 10
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Rotation deletes an old checkpoint before the new one is known to be complete.
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "checkpoint_every": 1, "log_every": 1}
        for name, bound in (least | {"keep_last": 2, "lora_rank": 0, "seed": 0}).items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise TrimtabError(f"{name}={value} must be at least {bound}")
        for name in ("learning_rate", "epochs", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise TrimtabError(f"{name}={getattr(self, name)} must be finite and positive")
        for name in ("learning_rate_warmup", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise TrimtabError(f"{name}={getattr(self, name)} must be finite and 0 or above")
        if self.lora_alpha is not None and not (self.lora_rank and self.lora_alpha > 0):
            raise TrimtabError(f"lora_alpha={self.lora_alpha} must be positive, and needs lora_rank")

    @property
    def effective_precision(self) -> Precision:
        """`precision`, or its default on this machine."""
        return self.precision or ("mixed" if torch.accelerator.is_available() else "float32")

    @property
    def dtype(self) -> Dtype:
        """Of the weights."""
        return "bfloat16" if self.effective_precision == "bfloat16" else "float32"

    @property
    def examples_per_step(self) -> int:
        """Examples of an optimiser step, over all processes."""
        return self.batch_size * self.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))


def optimiser_steps(training: TrainingSettings, examples: int, *, whole: Literal["none", "batches", "steps"]) -> int:
    """Optimiser steps of the run: those that the Trainer takes itself from `epochs`.

    whole: what the trainer leaves out when it would not be whole: nothing, a last batch, or a last step's batches.
    """
    per_batch = training.examples_per_step // training.gradient_accumulation
    unit = {"none": 1, "batches": per_batch, "steps": training.examples_per_step}[whole]
    if examples < unit:
        what = "one batch" if whole == "batches" else "the batches of one step"
        raise TrimtabError(
            f"batch_size={training.batch_size}: {examples} examples do not fill {what}, which takes {unit}"
        )
    batches = (examples // unit * unit) / per_batch
    steps = training.steps or math.ceil(
        training.epochs * math.ceil(math.ceil(batches) / training.gradient_accumulation)
    )
    if training.learning_rate_warmup >= max(steps, 2):
        raise TrimtabError(
            f"learning_rate_warmup={training.learning_rate_warmup:g} must be below the run's {steps} steps; below 1, "
            "it is a share of them"
        )
    return steps


def trl_arguments(training: TrainingSettings, out: Path, steps: int) -> dict[str, Any]:
    """Arguments of any TRL configuration."""
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    return {
        "output_dir": str(out / "checkpoints"),
        "learning_rate": training.learning_rate,
        "warmup_steps": training.learning_rate_warmup,
        "lr_scheduler_type": schedules[training.learning_rate_schedule],
        "max_steps": steps,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "max_grad_norm": training.grad_clip,
        "weight_decay": training.weight_decay,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": training.effective_precision == "mixed",
        _CHECKPOINTING: training.gradient_checkpointing,
        "seed": training.seed,
        "save_strategy": "steps",
        "save_steps": float(training.checkpoint_every),
        "save_total_limit": training.keep_last,
        "logging_steps": float(training.log_every),
        "report_to": list(training.report_to) or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }


def lora_config(training: TrainingSettings) -> Any:
    """Of the adapters; None where all weights are trained."""
    if not training.lora_rank:
        return None
    from peft import LoraConfig

    alpha = training.lora_alpha if training.lora_alpha is not None else 2 * training.lora_rank
    # PEFT's "all-linear" leaves the language head out, as TRL's losses want it.
    return LoraConfig(r=training.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


# -- a run -----------------------------------------------------------------------------------------


def finished_metrics(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of the run in `out` if it is finished, after checking that it is the run of `identity`.

    Raises TrimtabError if it is one of other options, and got as far as a checkpoint: the first difference is named.
    """
    mine, path = _plain(identity), out / RUN
    begun = _last_complete(out / "checkpoints") is not None or (out / METRICS).exists()
    if not path.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrimtabError(f"out={str(out)!r} is there, and is no run; accepted: a new directory, or that of a run")
    if path.exists() and begun:
        other = _read_object(path)
        for name in [*mine, *(name for name in other if name not in mine)]:
            if name not in UNOFFICIAL and mine.get(name) != other.get(name):
                raise TrimtabError(
                    f"out={str(out)!r} belongs to another run: {name} is {other.get(name)!r} there, expected "
                    f"{mine.get(name)!r}; accepted: the same options, or another directory"
                )
    return _read_object(out / METRICS) if (out / METRICS).exists() else None


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as it comes back from JSON, with the number of processes, on which sums depend."""
    return json.loads(json.dumps({**identity, "processes": int(os.environ.get("WORLD_SIZE", "1"))}, default=str))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise TrimtabError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TrimtabError(f"{str(path)!r} holds a {type(found).__name__}; accepted: an object")
    return found


def run_trainer(
    trainer: Any,
    tokenizer: Any,
    out: Path,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    before: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Train from the last complete checkpoint on, save what came out, and return the metrics.

    facts: what stands in the metrics beside what the trainer logs. before: what a new run begins with.

    Ctrl-C lets the step be finished and writes a checkpoint; a second one stops at once. Raises KeyboardInterrupt then.
    """
    if trainer.accelerator.is_main_process:
        write_file(out / RUN, json.dumps(_plain(identity), indent=2).encode())
    watch = _Watch(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)  # the last one: what others save is saved when it marks a checkpoint as complete
    # Not from the last step's own: the Trainer cannot take up a run that has no step left.
    last = _last_complete(out / "checkpoints", before=trainer.args.max_steps)
    with _interruptible(watch), hosts_to_themselves():
        if last is None and before is not None:
            before()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < trainer.args.max_steps:
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has left
        raise KeyboardInterrupt
    # The summary that the Trainer logs at the end, and TRL's count of tokens, begin anew where the run was taken up.
    history = [
        {name: value for name, value in entry.items() if name != "num_tokens"}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    trainer.save_model(str(out / "model"))
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(out / "model")
        (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to who loads the model
        write_file(out / "history.json", json.dumps(history, indent=2, sort_keys=True).encode())
    metrics = {"steps": trainer.args.max_steps, "last": history[-1], **facts}
    if trainer.accelerator.is_main_process:
        write_file(out / METRICS, json.dumps(metrics, indent=2, sort_keys=True).encode())
    return metrics


def show_summary(out: Path, metrics: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """A table of the figures `names` (key: what to call it) of the metrics, or of what was logged last."""
    table = Table("measure", "value", title=f"{out / 'model'}, {metrics['steps']:,} steps")
    for key, shown in names.items():
        value = metrics.get(key, metrics["last"].get(key))
        if value is not None:
            table.add_row(shown, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console().print(table)


def _last_complete(checkpoints: Path, *, before: float | int = math.inf) -> Path | None:
    """The last checkpoint of a step below `before` that was written to its end."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / COMPLETE).exists()
    }
    return found[max(steps)] if (steps := [step for step in found if step < before]) else None


@contextmanager
def hosts_to_themselves() -> Iterator[None]:
    """Warnings in a line, without what libraries tell each other about names that they will drop."""

    def in_a_line(message: object, *place: object) -> str:
        return f"trimtab: {message}\n"

    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.formatwarning = in_a_line  # type: ignore[assignment]
        try:
            yield
        finally:
            warnings.formatwarning = before


class _Watch(TrainerCallback):
    """Shows progress, marks complete checkpoints, and stops when it is asked to."""

    def __init__(self, trainer: Any) -> None:
        self.stop = False
        self._accelerator = trainer.accelerator
        self._bar: Progress | None = None
        self._note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar = Progress("training", state.max_steps, "steps", done=state.global_step).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and "loss" in logs:
            self._note = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._bar is not None:
            self._bar.advance(1, self._note)
        if self._is_to_stop():
            control.should_save = control.should_training_stop = True
        # What the Trainer has summed up since it last logged is in no checkpoint; the last step is saved as well.
        control.should_log = control.should_log or control.should_save

    def _is_to_stop(self) -> bool:
        """Whether any process was asked to: all must stop after one and the same step, or they wait for each other."""
        if self._accelerator.num_processes > 1:
            asked = torch.tensor([int(self.stop)], device=self._accelerator.device)
            self.stop = bool(self._accelerator.gather(asked).any())
        return self.stop

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_file(folder / COMPLETE, json.dumps({"step": state.global_step}).encode())

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None


@contextmanager
def _interruptible(watch: _Watch) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks `watch` to stop after the step; the second one stops."""
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        watch.stop = True
        restore()
        print("trimtab: stopping after this step; again to stop at once", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()
        watch.close()


# -- what it would take ----------------------------------------------------------------------------


def with_adapters(shapes: Any, training: TrainingSettings) -> Any:
    """A model on the meta device, with the adapters that training would give it."""
    adapters = lora_config(training)
    if adapters is None:
        return shapes
    from peft import get_peft_model

    with torch.device("meta"), hosts_to_themselves():
        return get_peft_model(shapes, adapters)


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes of a model's weights, and of those among them that are trained."""
    weights = list(model.parameters())
    return sum(w.nbytes for w in weights), sum(w.nbytes for w in weights if w.requires_grad)


def free_memory() -> int:
    """Bytes that a run may still take where it would train."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def seconds_per_step(trainer: Callable[..., Any], steps: int) -> float:
    """Measured on the run's first steps, of which the first one, which warms up, does not count if there are others."""
    with tempfile.TemporaryDirectory() as aside:
        trial = trainer(Path(aside), min(steps, 3), save_strategy="no", report_to="none")
        trial.remove_callback(PrinterCallback)
        trial.add_callback(clock := _Clock())
        with warnings.catch_warnings(action="ignore"):  # the plan says what there is to say
            trial.train()
    first, last = clock.ends[min(1, len(clock.ends) - 2)], clock.ends[-1]
    return (last - first) / max(len(clock.ends) - 2, 1)


class _Clock(TrainerCallback):
    """When training began, and when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do and take; `str()` is what `--dry_run` prints.

    `memory` and `disk`: bytes of each part. `seconds_per_step` is None where it was not measured.
    """

    title: str
    facts: tuple[str, ...]
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: float | None
    not_timed: str = ""

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds is not None else f"not estimated: {self.not_timed}"
        lines = [f"would {self.title}:", *(f"  {fact}" for fact in self.facts), f"  time    {minutes}"]
        for name, parts, beside in (("memory", self.memory, ", and activations"), ("disk", self.disk, "")):
            listed = ", ".join(f"{part} {_mib(size)}" for part, size in parts.items() if size)
            lines.append(f"  {name:<7} {_mib(sum(parts.values()))} MiB: {listed}{beside}")
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}" if size >= 10 * MIB else f"{size / MIB:.2f}"
