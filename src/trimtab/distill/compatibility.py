"""What must fit before `TRBTrainer` trains: arguments, how to sample, two models' vocabularies and tokenizers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from accelerate.logging import get_logger
from transformers import AutoConfig, AutoTokenizer
from trl import DistillationConfig
from trl.trainer.utils import get_config_model_id

from trimtab.core.errors import TrimtabError
from trimtab.distill.config import TRBConfig
from trimtab.distill.eos import check_tokenizers
from trimtab.distill.loss import Comparison
from trimtab.distill.rollouts import RolloutPolicy

__all__ = [
    "check_comparison",
    "check_sampling",
    "common_tokens",
    "differ_in_size",
    "own_config",
    "teachers_tokenizer",
]

logger = get_logger(__name__)


def own_config(args: DistillationConfig | None, model: Any) -> TRBConfig:
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return TRBConfig(f"{name.split('/')[-1]}-TRB")
    if isinstance(args, TRBConfig):
        return args
    return TRBConfig(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})


def check_sampling(args: TRBConfig, policy: RolloutPolicy) -> None:
    """Refused now, and not in the middle of a run: what `generate_guided` refuses."""
    if not policy.needs_teacher(0):
        return
    given = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    given |= args.generation_kwargs or {}
    neutral = {
        "top_p": (1.0,),
        "top_k": (0, None),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
        "num_beams": (1,),
        "do_sample": (True,),
        "assistant_model": (None,),
        "assistant_early_exit": (None,),
        "prompt_lookup_num_tokens": (None,),
        "temperature": (args.temperature,),
    }
    for name, value in given.items():
        if name in neutral and value not in neutral[name]:
            raise TrimtabError(
                f"{name}={value}: where the teacher writes along, rollouts are plain samples "
                f"({name}={neutral[name][0]}), since the divergence from the student is that of the tempered "
                "distributions before any such change."
            )
    if args.cache_implementation not in (None, "dynamic", "static"):
        raise TrimtabError(
            f"cache_implementation={args.cache_implementation!r}: where the teacher writes along it must be None, "
            "'dynamic' or 'static'."
        )


def check_comparison(comparison: Comparison, beta: float | int, head: int) -> None:
    """What the loss compares, of heads of which the smaller has `head` ids."""
    if beta != 1.0 and not comparison.is_trls:
        sizes = "equal" if comparison.vocab_size is None else "different"
        raise TrimtabError(
            f"beta={beta}: with {comparison.stop_ids} and heads of {sizes} sizes, the loss is the reverse KL, beta=1.0."
        )
    size = head if comparison.vocab_size is None else comparison.vocab_size
    if comparison.estimator != "full" and comparison.k > size:
        raise TrimtabError(f"loss_top_k={comparison.k} must be at most {size}, the size of the vocabulary.")


def differ_in_size(student: Any, teacher: Any, args: TRBConfig) -> bool:
    """Whether the heads differ in size, which must have been allowed."""
    sizes = [
        _vocab_size(model, revision, args)
        for model, revision in (
            (student, (args.model_init_kwargs or {}).get("revision")),
            (teacher, (args.teacher_model_init_kwargs or {}).get("revision", args.teacher_model_revision)),
        )
    ]
    if sizes[0] != sizes[1] and not args.allow_padded_vocabulary:
        raise TrimtabError(
            f"The student has logits for {sizes[0]} ids and the teacher for {sizes[1]}. If both have one tokenizer and "
            "only pad it differently, set allow_padded_vocabulary=True; models of different tokenizers cannot be "
            "compared token by token."
        )
    return sizes[0] != sizes[1]


def _vocab_size(model: Any, revision: str | None, args: TRBConfig) -> int:
    if isinstance(model, str):
        trust = args.trust_remote_code
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust)
    else:
        config = model.config
    return int(config.get_text_config().vocab_size)


def teachers_tokenizer(teacher: Any, given: Any, args: TRBConfig) -> Any:
    """The one given, or the one beside a teacher that is given by name; None where there is none."""
    if given is None and isinstance(teacher, str):
        revision = (args.teacher_model_init_kwargs or {}).get("revision", args.teacher_model_revision)
        try:
            trust = args.trust_remote_code
            given = AutoTokenizer.from_pretrained(teacher, revision=revision, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            logger.warning(
                f"The tokenizer of the teacher {teacher!r} cannot be loaded, so it is taken to be the student's. "
                f"Give teacher_processing_class to have the two compared. {error}"
            )
    return getattr(given, "tokenizer", given)


def common_tokens(tokenizer: Any, teachers: Any) -> int:
    """How many ids the tokenizers share, which must be the same tokens where the teacher's tokenizer is known."""
    if teachers is None:
        return max(tokenizer.get_vocab().values()) + 1
    return check_tokenizers(tokenizer, teachers)
