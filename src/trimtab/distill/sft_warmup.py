"""Supervised warm-up: before on-policy distillation the student learns from answers of the teacher's.

Source: the baseline "SFT warm-up" of trust-region behaviour blending, arXiv 2605.31159: several answers of the
teacher's at temperature 1 to each prompt of the first steps, 15 to 50 updates of cross-entropy, then distillation from
the start of the same stream of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from trimtab.core.errors import TrimtabError
from trimtab.distill.rollouts import TeacherOnly
from trimtab.distill.trainer import TRBTrainer

__all__ = ["sft_warmup"]


def sft_warmup(
    trainer: TRBTrainer,
    *,
    updates: int = 25,
    prompt_steps: int = 50,
    answers_per_prompt: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Train `trainer`'s student on answers of its teacher; `trainer.train()` then distils as if nothing had been.

    The prompts are those of the trainer's first `prompt_steps` optimiser steps. The answers are written at its
    temperature, up to its `max_completion_length`, over the models' common vocabulary, and end with the student's
    stop id. They are trained on with the paper's settings (lr 1e-5, constant after 15 steps, weight decay 0.01), the
    trainer's batch, precision and seed, and without checkpoints; `settings` are fields of `trl.SFTConfig` to have
    otherwise.

    Returns what `SFTTrainer.train` returns. Raises `TrimtabError` for numbers below 1, for a trainer that has begun,
    and under DeepSpeed or FSDP, where the student's weights are in place within `train` only.
    """
    for name, value in (
        ("updates", updates),
        ("prompt_steps", prompt_steps),
        ("answers_per_prompt", answers_per_prompt),
    ):
        if value < 1:
            raise TrimtabError(f"{name}={value} must be at least 1.")
    if trainer.state.global_step:
        raise TrimtabError(f"The trainer is at step {trainer.state.global_step}: the warm-up comes before train().")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise TrimtabError("sft_warmup under DeepSpeed or FSDP: fine-tune the student in a run of its own instead.")
    answers = _teacher_answers(trainer, prompt_steps, answers_per_prompt)
    # Not before: new arguments of a trainer reset accelerate's state, until a trainer is made of them.
    args = SFTConfig(**{**_settings(trainer), **(settings or {}), "max_steps": updates})
    return SFTTrainer(
        model=trainer.model,
        args=args,
        train_dataset=Dataset.from_list(answers),
        processing_class=trainer.processing_class,
    ).train()


def _teacher_answers(trainer: TRBTrainer, steps: int, each: int) -> list[dict[str, list[int]]]:
    """Prompts and answers of all processes as one sequence each, with labels on the answers."""
    repeats = trainer.args.gradient_accumulation_steps  # so often TRL's loader gives the prompts of a step
    policy, trainer.rollout_policy = trainer.rollout_policy, TeacherOnly(1)
    trainer.model.train()
    answers = []
    try:
        for examples in islice(_passes(trainer.get_train_dataloader()), 0, steps * repeats, repeats):
            prompts, images, others = trainer._tokenize_prompts([example["prompt"] for example in examples])
            prompts = [prompt for prompt in prompts for _ in range(each)]
            written = trainer._generate_single_turn(prompts, images, others)
            answers += [
                {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
                for prompt, answer in zip(prompts, written, strict=True)
            ]
    finally:
        trainer.rollout_policy = policy
    return gather_object(answers)


def _passes(loader: Iterable[Any]) -> Iterator[Any]:
    """One pass over the prompts after the other, as in training."""
    while True:
        nothing = True
        for examples in loader:
            yield examples
            nothing = False
        if nothing:
            raise TrimtabError("train_dataset has fewer prompts than a step takes.")


def _settings(trainer: TRBTrainer) -> dict[str, Any]:
    args = trainer.args
    shared = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "max_grad_norm",
        "bf16",
        "fp16",
        "use_cpu",
        "seed",
        "logging_steps",
        "report_to",
        "dataloader_pin_memory",
        "disable_tqdm",
    )
    return {
        **{name: getattr(args, name) for name in shared},
        "output_dir": str(Path(args.output_dir) / "sft_warmup"),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 15,
        "weight_decay": 0.01,
        "max_length": None,
        "save_strategy": "no",
    }
