"""`trimtab align`: preference training whose reference policy follows the trained one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.cli.examples import (
    DataSettings,
    digest,
    labelled_completions,
    load_examples,
    preference_pairs,
    set_chat_template,
    within_length,
)
from trimtab.cli.models import causal_model_without_weights, load_model_on_cpu, load_tokenizer
from trimtab.cli.training import (
    Plan,
    TrainingSettings,
    finished_metrics,
    free_memory,
    hosts_to_themselves,
    lora_config,
    optimiser_steps,
    run_trainer,
    seconds_per_step,
    show_summary,
    trl_arguments,
    weight_bytes,
    with_adapters,
)
from trimtab.core.errors import TrimtabError

__all__ = ["AlignTraining", "ReferenceSettings", "align"]

Loss = Literal["dpo", "ipo", "kto"]
SUMMARY = {
    "loss": "loss",
    "rewards/accuracies": "pairs in the right order",
    "rewards/margins": "margin of rewards",
    "kl": "KL to the reference (estimate)",
    "reference/updates": "updates of the reference",
    "reference/distance": "distance from the reference",
    "reference/kl_initial": "KL from the first reference, a token",
}


@dataclass(frozen=True, kw_only=True)
class AlignTraining(TrainingSettings):
    """How the policy is trained; the defaults are the paper's where it has one."""

    learning_rate: float = 1e-6
    grad_clip: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """How the reference policy follows the trained one.

    Args:
        reference: fixed (the base method); soft: after each step, alpha of the policy and 1 - alpha of the reference;
            hard: the policy itself, every tau steps; mixed: soft, every tau steps; every: as mixed, at equal parts of
            the run
        alpha: weight of the policy; default: 0.6, with `every` 1
        tau: steps between updates; default: 512
        every: with `every`, the part of the run between updates, such as 0.1
        lora_soft: with LoRA, how a soft update is made: of the factors, an approximation, or exact, which holds a dense
            float32 difference for every adapted layer
    """

    reference: Literal["fixed", "soft", "hard", "mixed", "every"] = "hard"
    alpha: float | None = None
    tau: int | None = None
    every: float | None = None
    lora_soft: Literal["factors", "exact"] = "factors"

    def __post_init__(self) -> None:
        accepted = {"alpha": ("soft", "mixed", "every"), "tau": ("hard", "mixed"), "every": ("every",)}
        for name, kinds in accepted.items():
            if getattr(self, name) is not None and self.reference not in kinds:
                raise TrimtabError(
                    f"{name}={getattr(self, name)} has no meaning for reference={self.reference!r}; accepted with: "
                    f"{', '.join(kinds)}"
                )
        if self.reference == "every" and self.every is None:
            raise TrimtabError("reference='every' needs every, the part of the run between updates, such as 0.1")

        if self.every is not None and not 0 < self.every <= 1:
            raise TrimtabError(f"every={self.every} must lie in (0, 1]: it is a part of the run")

    def build(self, *, measure: bool) -> Any:
        """The library's reference; None if it is fixed."""
        if self.reference == "fixed":
            return None
        from trimtab.align.reference import TrustRegionReference as Reference

        options: dict[str, Any] = {"lora": self.lora_soft, "measure": measure}
        options |= {} if self.alpha is None else {"alpha": self.alpha}
        options |= {} if self.tau is None else {"tau": self.tau}
        options |= {} if self.every is None else {"fraction": self.every}
        match self.reference:
            case "soft":
                return Reference.soft(**options)
            case "hard":
                return Reference.hard(**options)
            case "mixed":
                return Reference.mixed(**options)
        return Reference.every(**options)


def align(
    *,
    model: str,
    out: Path,
    loss: Loss = "dpo",
    beta: float = 0.05,
    max_length: int | None = None,
    ipo_form: Literal["means", "sums"] = "means",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    measure: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    data: DataSettings,
    reference: ReferenceSettings,
    training: AlignTraining,
) -> None:
    """Train a model on preferences, with a reference that follows it (TR-DPO, TR-IPO, TR-KTO) or stays (DPO, IPO, KTO).

    The data have the columns prompt, chosen and rejected, for KTO prompt, completion and label as well. Run again with
    the same options, it goes on from the last checkpoint under `out`.

    Args:
        model: folder or hub name of a causal language model, which is the first reference too
        out: directory of the run
        loss: dpo, ipo, or kto
        beta: how much the reference holds the policy back
        max_length: tokens of an example, what is beyond is cut off; default: 1024, or the model's positions if fewer
        ipo_form: ipo: of means of log-ratios over a completion's tokens, as TRL has it, or of sums, as its paper has it
        desirable_weight: kto: weight of desirable completions
        undesirable_weight: kto: weight of undesirable ones
        measure: measure KL, margins and distance to the current and the first reference at each log
        trust_remote_code: run code that comes with the model
        dry_run: say what would run, how long, with how much memory and disk; then stop
    """
    for name, value in (("beta", beta), ("max_length", max_length)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TrimtabError(f"{name}={value} must be positive")
    if loss == "kto" and training.batch_size < 2:
        raise TrimtabError(f"batch_size={training.batch_size}: kto pairs a batch's prompts with others' completions; "
                           "accepted: 2 or more")  # fmt: skip
    if reference.lora_soft == "exact" and not training.lora_rank:
        raise TrimtabError("lora_soft='exact' has no meaning without adapters; accepted: with lora_rank")
    if measure and reference.reference == "fixed":
        raise TrimtabError("measure has no meaning for reference='fixed': it never moves")
    if loss != "ipo" and ipo_form != "means":
        raise TrimtabError(f"ipo_form={ipo_form!r} has no meaning for loss={loss!r}; accepted: ipo")
    if loss != "kto" and (desirable_weight, undesirable_weight) != (1.0, 1.0):
        raise TrimtabError(f"desirable_weight and undesirable_weight have no meaning for loss={loss!r}; accepted: kto")
    shapes = causal_model_without_weights(model, training.dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    set_chat_template(tokenizer, data.chat_template)
    length = max_length or min(1024, getattr(shapes.config.get_text_config(), "max_position_embeddings", 1024))
    loaded = load_examples(data, seed=training.seed)
    found = (
        labelled_completions(loaded, tokenizer, seed=training.seed)
        if loss == "kto"
        else preference_pairs(loaded, tokenizer)
    )
    examples = within_length(found, tokenizer, length)
    steps = optimiser_steps(training, len(examples), whole="batches" if loss == "kto" else "none")
    moving = reference.build(measure=measure)

    def trainer(directory: Path, steps: int, **options: Any) -> Any:
        policy = load_model_on_cpu(model, training.dtype, trust_remote_code=trust_remote_code)
        arguments = trl_arguments(training, directory, steps) | options
        arguments |= {"beta": beta, "max_length": length, "trust_remote_code": trust_remote_code}
        if loss == "kto":
            arguments |= {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
            arguments |= {"dataloader_drop_last": True}  # a lone example has no other's completion
        else:
            arguments |= {"loss_type": ["ipo" if loss == "ipo" else "sigmoid"]}
        with hosts_to_themselves():
            return _trainer(loss, ipo_form, moving, policy, arguments, examples, tokenizer, lora_config(training))

    if dry_run:
        updates = moving.schedule.updates(steps) if moving is not None else 0
        left_out = len(found) - len(examples)
        facts = (
            f"{len(examples):,} examples of {training.examples_per_step} a step, {steps:,} steps"
            + (f"; {left_out:,} left out, whose prompt has {length:,} tokens or more" if left_out else ""),
            f"reference {reference.reference}, {updates:,} updates"
            + ("" if updates or moving is None else ": it never moves in so few steps, and this is the base method"),
        )
        shapes = with_adapters(shapes, training)
        print(_plan(f"align {model} ({loss})", facts, shapes, trainer, steps, moving, training))
        return
    identity = {"command": "align", "model": model, "loss": loss, "beta": beta, "max_length": length}
    identity |= {"ipo_form": ipo_form}
    identity |= {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight, "measure": measure}
    identity |= asdict(reference) | asdict(data) | asdict(training) | {"data_sha256": digest(loaded)}
    metrics = finished_metrics(out, identity)
    if metrics is None:
        metrics = run_trainer(
            trainer(out, steps),
            tokenizer,
            out,
            identity,
            {"examples": len(examples), "left_out": len(found) - len(examples)},
        )
    show_summary(out, metrics, SUMMARY)


def _trainer(
    loss: Loss,
    ipo_form: str,
    moving: Any,
    policy: Any,
    arguments: dict[str, Any],
    examples: Any,
    tokenizer: Any,
    adapters: Any,
) -> Any:
    import trl

    shared = {"train_dataset": examples, "processing_class": tokenizer, "peft_config": adapters}
    shared["args"] = (trl.KTOConfig if loss == "kto" else trl.DPOConfig)(**arguments)
    if loss != "kto":
        shared["ipo_form"] = ipo_form
    if moving is None:
        from trimtab.align.ipo import IPOFormTrainer

        return (trl.KTOTrainer if loss == "kto" else IPOFormTrainer)(policy, **shared)
    from trimtab.align.trainer import TRDPOTrainer, TRKTOTrainer

    return (TRKTOTrainer if loss == "kto" else TRDPOTrainer)(policy, reference=moving, **shared)


def _plan(
    title: str,
    facts: tuple[str, ...],
    shapes: Any,
    trainer: Callable[..., Any],
    steps: int,
    moving: Any,
    training: AlignTraining,
) -> Plan:
    weights, trained = weight_bytes(shapes)
    saved = trained if training.lora_rank else weights
    reference, state = _reference_bytes(shapes, moving, training, saved)
    memory = {"policy": weights, "gradients": trained, "optimiser": 2 * trained, "reference": reference}
    fits = sum(memory.values()) < free_memory()
    return Plan(
        title=title,
        facts=facts,
        memory=memory,
        disk={"model": saved, "checkpoints": training.keep_last * (saved + 2 * trained + state)},
        seconds=seconds_per_step(trainer, steps) * steps if fits else None,
        not_timed="it would not fit into the memory that is free here",
    )


def _reference_bytes(shapes: Any, moving: Any, training: AlignTraining, saved: int) -> tuple[int, int]:
    """Bytes that the reference takes in memory, and in a checkpoint. `saved`: those of what is trained."""
    if moving is None:
        return (0 if training.lora_rank else saved), 0  # without its adapter, the policy is the first reference
    averaged = moving.schedule.averages
    held = saved
    if averaged and moving.lora == "exact" and training.lora_rank:
        adapted = [module for module in shapes.modules() if hasattr(module, "lora_A")]
        held += sum(4 * module.get_base_layer().weight.numel() for module in adapted)
    # The master of a reference in bfloat16 is in float32.
    master = 2 * saved if averaged and training.dtype == "bfloat16" and not training.lora_rank else 0
    return held + master + (held if moving.measure else 0), master or held
