"""`trimtab distill`: a student trained on what it writes itself, at first with the teacher's help."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.cli.examples import DataSettings, digest, load_examples, prompts, set_chat_template, within_length
from trimtab.cli.models import Dtype, causal_model_without_weights, load_model_on_cpu, load_tokenizer
from trimtab.cli.training import (
    Plan,
    TrainingSettings,
    finished_metrics,
    hosts_to_themselves,
    lora_config,
    optimiser_steps,
    run_trainer,
    show_summary,
    trl_arguments,
    weight_bytes,
    with_adapters,
)
from trimtab.core.errors import TrimtabError

__all__ = ["DistillTraining", "LossSettings", "RolloutSettings", "distill"]

Rollouts = Literal["trust_region", "vanilla", "fixed", "skd", "temperature", "mixture", "sft_warmup"]
SUMMARY = {
    "loss": "reverse KL a token",
    "completions/mean_length": "tokens of an answer",
    "rollout/teacher_log_prob": "log-probability that the teacher gives a token",
}


@dataclass(frozen=True, kw_only=True)
class DistillTraining(TrainingSettings):
    """How the student is trained; the defaults are the paper's where it has one."""

    learning_rate: float = 1e-5
    learning_rate_schedule: Literal["linear", "cosine", "constant"] = "constant"
    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Who writes the answers that the student is trained on.

    Args:
        rollouts: trust_region: as near to the teacher as a budget of KL allows, which shrinks to 0; fixed: with a
            budget that stays; vanilla: the student; skd: the student, but the teacher where a token is none of its
            likeliest; temperature: the student, at first cooler; mixture: the teacher in a part of the tokens;
            sft_warmup: the student, after supervised steps on answers of the teacher's
        epsilon: trust_region and fixed: the budget in nats per token; default: 0.02
        warmup_steps: steps until the budget is 0 (trust_region, default: 50) or the temperature 1 (temperature,
            default: 25), or supervised steps (sft_warmup, default: 25)
        initial_temperature: temperature: where it starts; default: 0.8
        skd_top_k: skd: how many of the teacher's tokens are accepted; default: 25
        skd_temperature: skd: the teacher's temperature; default: 0.6
        teacher_weight: mixture: the part of the teacher; default: 0.2
    """

    rollouts: Rollouts = "trust_region"
    epsilon: float | None = None
    warmup_steps: int | None = None
    initial_temperature: float | None = None
    skd_top_k: int | None = None
    skd_temperature: float | None = None
    teacher_weight: float | None = None

    def __post_init__(self) -> None:
        accepted = {
            "epsilon": ("trust_region", "fixed"),
            "warmup_steps": ("trust_region", "temperature", "sft_warmup"),
            "initial_temperature": ("temperature",),
            "skd_top_k": ("skd",),
            "skd_temperature": ("skd",),
            "teacher_weight": ("mixture",),
        }
        for name, kinds in accepted.items():
            if getattr(self, name) is not None and self.rollouts not in kinds:
                raise TrimtabError(
                    f"{name}={getattr(self, name)} has no meaning for rollouts={self.rollouts!r}; accepted with: "
                    f"{', '.join(kinds)}"
                )

    def policy(self) -> Any:
        """The library's rollout policy; after a supervised warm-up, the student's."""
        from trimtab.distill import rollouts

        budget, steps = _given(epsilon=self.epsilon), self.warmup_steps
        match self.rollouts:
            case "trust_region":
                return rollouts.TrustRegion(**budget, **_given(warmup_steps=steps))
            case "fixed":
                return rollouts.TrustRegion(**budget, schedule="constant")
            case "skd":
                return rollouts.SKD(**_given(top_k=self.skd_top_k, teacher_temperature=self.skd_temperature))
            case "temperature":
                return rollouts.TemperatureWarmup(**_given(initial=self.initial_temperature, steps=steps))
            case "mixture":
                return rollouts.TeacherMixture(**_given(teacher_weight=self.teacher_weight))
        return rollouts.Vanilla()


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """How the reverse KL to the teacher is computed.

    Args:
        loss_estimator: full, or of the student's likeliest tokens: topk_renorm, topk_tail, topk_pg (see the
            documentation of trimtab.distill.functional)
        loss_top_k: how many tokens these take
        temperature: of both models, in sampling and in the loss
        student_stop_ids: tokens that end an answer of the student's; default: as its generation configuration has it
        teacher_stop_ids: the same of the teacher
        allow_padded_vocabulary: models whose heads have other sizes, because padding rows follow the vocabulary
        offload_teacher: keep the teacher in the CPU's memory while it is not needed
    """

    loss_estimator: Literal["full", "topk_renorm", "topk_tail", "topk_pg"] = "full"
    loss_top_k: int = 16
    temperature: float = 1.0
    student_stop_ids: tuple[int, ...] | None = None
    teacher_stop_ids: tuple[int, ...] | None = None
    allow_padded_vocabulary: bool = False
    offload_teacher: bool = False


def distill(
    *,
    student: str,
    teacher: str,
    out: Path,
    completions_per_prompt: int = 1,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    prompt_tokens: int | None = None,
    system_prompt: str | None = None,
    teacher_dtype: Dtype | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    data: DataSettings,
    rollout: RolloutSettings,
    loss: LossSettings,
    training: DistillTraining,
) -> None:
    """Train a student on what it writes itself, towards a teacher of the same vocabulary (on-policy distillation, TRB).

    The data have a column prompt, or conversations, of which what comes before the first answer is the prompt, or with
    prompt_tokens a column text. Run again with the same options, it goes on from the last checkpoint under `out`.

    Args:
        student: folder or hub name of a causal language model
        teacher: folder or hub name of another one
        out: directory of the run
        completions_per_prompt: answers to each prompt, all in one step; a batch counts answers
        max_prompt_length: longer prompts are left out; default: 1024, or half of the student's positions if fewer
        max_completion_length: tokens of an answer; default: 512, or what the student's positions leave
        prompt_tokens: take so many first tokens of the column text as prompts
        system_prompt: put before conversations that have none
        teacher_dtype: of the teacher's weights; default: as the student's
        trust_remote_code: run code that comes with the models
        dry_run: say what would run, with how much memory and disk; then stop
    """
    for name, value in (
        ("completions_per_prompt", completions_per_prompt),
        ("max_prompt_length", max_prompt_length),
        ("max_completion_length", max_completion_length),
    ):
        if value is not None and value < 1:
            raise TrimtabError(f"{name}={value} must be at least 1")
    if training.examples_per_step % completions_per_prompt:
        raise TrimtabError(
            f"completions_per_prompt={completions_per_prompt} must divide the {training.examples_per_step} answers of "
            "a step (batch_size times gradient_accumulation and processes)"
        )
    policy = rollout.policy()
    shapes, teacher_shapes = (
        causal_model_without_weights(name, dtype, trust_remote_code=trust_remote_code)
        for name, dtype in ((student, training.dtype), (teacher, teacher_dtype or training.dtype))
    )
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
    set_chat_template(tokenizer, data.chat_template)
    longest, answer = _lengths(shapes, max_prompt_length, max_completion_length)
    loaded = load_examples(data, seed=training.seed)
    found = prompts(loaded, tokenizer, prompt_tokens=prompt_tokens, system_prompt=system_prompt)
    kept = within_length(found, tokenizer, longest + 1)
    # Answers to one prompt stand side by side, in a random order of prompts that the trainer does not shuffle again.
    examples = kept.shuffle(seed=training.seed)
    examples = examples.select([i for i in range(len(kept)) for _ in range(completions_per_prompt)])
    steps = optimiser_steps(training, len(examples), whole="steps")
    if dry_run:
        facts = tuple(
            _facts(len(found), len(kept), completions_per_prompt, longest, answer, policy, rollout, training, steps)
        )
        print(_plan(f"distill {teacher} into {student} ({rollout.rollouts})", facts, shapes, teacher_shapes, training))
        return
    identity = {"command": "distill", "student": student, "teacher": teacher, "prompt_tokens": prompt_tokens}
    identity |= {"completions_per_prompt": completions_per_prompt, "max_prompt_length": longest}
    identity |= {"max_completion_length": answer, "system_prompt": system_prompt, "teacher_dtype": teacher_dtype}
    identity |= asdict(rollout) | asdict(loss) | asdict(data) | asdict(training) | {"data_sha256": digest(loaded)}
    metrics = finished_metrics(out, identity)
    if metrics is None:
        from trimtab.distill.config import TRBConfig
        from trimtab.distill.trainer import TRBTrainer

        arguments = trl_arguments(training, out, steps) | {"max_completion_length": answer, "shuffle_dataset": False}
        arguments |= asdict(loss) | {"trust_remote_code": trust_remote_code}
        model, teacher_model = (
            load_model_on_cpu(name, dtype, trust_remote_code=trust_remote_code)
            for name, dtype in ((student, training.dtype), (teacher, teacher_dtype or training.dtype))
        )
        with hosts_to_themselves():
            trainer = TRBTrainer(
                model=model,
                teacher_model=teacher_model,
                args=TRBConfig(**arguments),
                train_dataset=examples,
                processing_class=tokenizer,
                peft_config=lora_config(training),
                rollout_policy=policy,
            )
        before = _supervised(trainer, rollout) if rollout.rollouts == "sft_warmup" else None
        metrics = run_trainer(trainer, tokenizer, out, identity, {"prompts": len(kept)}, before=before)
    show_summary(out, metrics, SUMMARY)


def _supervised(trainer: Any, rollout: RolloutSettings) -> Callable[[], object]:
    """The supervised steps on answers of the teacher's."""
    from trimtab.distill.sft_warmup import sft_warmup

    def warm_up() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # where its trainer's logs do not stand among the results
            sft_warmup(trainer, **_given(updates=rollout.warmup_steps))

    return warm_up


def _given(**options: Any) -> dict[str, Any]:
    """The options that are given; for the others the library's defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def _lengths(shapes: Any, prompt: int | None, answer: int | None) -> tuple[int, int]:
    """Most tokens of a prompt and of an answer, which must fit into the model's positions together."""
    positions = getattr(shapes.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    prompt = prompt or min(1024, positions // 2)
    answer = answer or min(512, positions - prompt)
    if answer < 1 or prompt + answer > positions:
        raise TrimtabError(
            f"max_prompt_length={prompt} and max_completion_length={answer} are beyond the student's {positions:,} "
            "positions together"
        )
    return prompt, answer


def _facts(
    found: int,
    kept: int,
    completions: int,
    longest: int,
    answer: int,
    policy: Any,
    rollout: RolloutSettings,
    training: DistillTraining,
    steps: int,
) -> Iterator[str]:
    yield (
        f"{kept:,} prompts"
        + (f" with {completions} answers each" if completions > 1 else "")
        + f" of at most {answer:,} tokens, {training.examples_per_step} answers a step, {steps:,} steps"
        + (f"; {found - kept:,} left out, of more than {longest:,} tokens" if found > kept else "")
    )
    if rollout.rollouts == "sft_warmup":
        yield "before them, supervised steps on answers of the teacher's to the first prompts"
    guided = sum(policy.needs_teacher(step) for step in range(steps))
    yield f"the teacher writes along in {guided:,} of them" if guided else "the student writes alone"
    if rollout.rollouts == "trust_region" and guided == steps:
        yield "the warm-up lasts for the whole run: it never becomes on-policy"


def _plan(title: str, facts: tuple[str, ...], shapes: Any, teacher: Any, training: DistillTraining) -> Plan:
    weights, trained = weight_bytes(with_adapters(shapes, training))
    model = trained if training.lora_rank else weights
    return Plan(
        title=title,
        facts=facts,
        memory={
            "student": weights,
            "gradients": trained,
            "optimiser": 2 * trained,
            "teacher": weight_bytes(teacher)[0],
        },
        disk={"model": model, "checkpoints": training.keep_last * (model + 2 * trained)},
        seconds=None,
        not_timed="a step takes as long as the answers that are written in it",
    )
