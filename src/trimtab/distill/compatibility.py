"""What must fit before `TRBTrainer` trains: arguments, two models' vocabularies and tokenizers."""

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

__all__ = [
    "check_comparison",
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
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    own = sorted(given.keys() - {field.name for field in fields(TRBConfig)})
    if own:
        raise TrimtabError(f"args={type(args).__name__} has {own}, which TRBConfig has not: derive it from TRBConfig.")
    return TRBConfig(**given)


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
