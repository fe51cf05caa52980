"""Two models over one vocabulary: one stop event where their stop ids differ, heads padded to different sizes.

Source: trust-region behaviour blending, arXiv 2605.31159: Qwen3-Base and Qwen3 have one vocabulary and stop at
different tokens, so that a student would be taught to write what does not stop it.

Symbols: e_S the student's first stop id, which stands for the stop event; M a model, either of the two. With the
logits l_M and M's own stop ids,

    l'_M[e_S]  = logsumexp over M's own stop ids u of l_M[u]
    l'_M[v]    = -inf       at every other stop id v of either model
    l'_M[v]    = l_M[v]     elsewhere

and softmax renormalises: what a model loses is its probability of stop ids that are the other model's alone (the
paper does not say what becomes of it). Where both stop at the same ids, be they several, nothing changes: they are
one vocabulary already, and the loss is TRL's own. That is finer than one stop event, whose parts are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = ["StopIds", "canonicalise", "check_tokenizers", "suppressed_ids"]


@dataclass(frozen=True)
class StopIds:
    """The ids at which each model stops; the student's first is the one that is written.

    Raises `TrimtabError` for a model without any, and for ids that are negative or twice there.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, ids in (("student", self.student), ("teacher", self.teacher)):
            if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
                raise TrimtabError(f"{name}={ids} must be one or more different ids, none below 0.")

    @property
    def written(self) -> int:
        """e_S, the one stop id that is left."""
        return self.student[0]

    @property
    def masked(self) -> tuple[int, ...]:
        """Every other stop id of either model; none where both stop at the same ids."""
        if {*self.student} == {*self.teacher}:
            return ()
        return tuple(sorted({*self.student, *self.teacher} - {self.written}))


def canonicalise(
    student_logits: Tensor, teacher_logits: Tensor, stop_ids: StopIds | None, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both models' logits, [*batch, vocab], over one vocabulary in which one id is the end: l' of both.

    - `stop_ids`: None leaves them as they are.
    - `vocab_size`: both are cut to so many ids, where heads are padded beyond the tokenizer; None asks for equal ones.

    Differentiable in both; the arguments are not changed, and may be returned where there is nothing to do. Logits of
    one position of two models, or of many. Raises `TrimtabError` for vocabularies that do not fit and ids outside.
    """
    sizes = (student_logits.shape[-1], teacher_logits.shape[-1])
    if vocab_size is None and sizes[0] != sizes[1]:
        raise TrimtabError(
            f"student_logits and teacher_logits are over {sizes[0]} and {sizes[1]} ids: they must be equal, or "
            "vocab_size must say how many ids the common tokenizer has."
        )
    size = sizes[0] if vocab_size is None else vocab_size
    if not 1 <= size <= min(sizes):
        raise TrimtabError(f"vocab_size={size} must lie in 1..{min(sizes)}: logits are over {sizes[0]} and {sizes[1]}.")
    student_logits, teacher_logits = student_logits[..., :size], teacher_logits[..., :size]
    _check_inside(stop_ids, size)
    if stop_ids is None or not stop_ids.masked:
        return student_logits, teacher_logits
    masked = torch.tensor(stop_ids.masked)
    return (
        _with_one_stop(student_logits, stop_ids.student, stop_ids.written, masked),
        _with_one_stop(teacher_logits, stop_ids.teacher, stop_ids.written, masked),
    )


def suppressed_ids(stop_ids: StopIds | None, head: int, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids that a student which samples alone, with `head` logits, must not write: generation's `suppress_tokens`.

    They are the teacher's stop ids that do not stop the student, and those from `vocab_size` on. The student's
    further stop ids stay: each is the stop event. Raises `TrimtabError` for a `vocab_size` outside 1..head.
    """
    size = head if vocab_size is None else vocab_size
    if not 1 <= size <= head:
        raise TrimtabError(f"vocab_size={size} must lie in 1..{head}.")
    _check_inside(stop_ids, size)
    foreign = set() if stop_ids is None else {*stop_ids.teacher} - {*stop_ids.student}
    return (*sorted(foreign), *range(size, head))


def check_tokenizers(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """The number of ids that both tokenizers know, the same token at each: the `vocab_size` of `canonicalise`.

    One may have tokens that the other lacks, such as padding that was added. Raises `TrimtabError` with the first id
    that both name, and differently.
    """
    student, teacher = ({i: t for t, i in x.get_vocab().items()} for x in (student_tokenizer, teacher_tokenizer))
    both = sorted(student.keys() & teacher.keys())
    for i in both:
        if student[i] != teacher[i]:
            raise TrimtabError(
                f"The tokenizers differ: token id {i} is {student[i]!r} for the student and {teacher[i]!r} for the "
                "teacher. Distributions can be compared only over one vocabulary."
            )
    return both[-1] + 1


def _with_one_stop(logits: Tensor, own: Sequence[int], written: int, masked: Tensor) -> Tensor:
    stops = logits[..., list(own)]
    # Where all are masked the gradient of logsumexp is nan.
    nothing = (stops == -torch.inf).all(-1)
    stop = stops.masked_fill(nothing.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(nothing, -torch.inf)
    logits = logits.index_fill(-1, masked.to(logits.device), -torch.inf)
    logits[..., written] = stop
    return logits


def _check_inside(stop_ids: StopIds | None, size: int) -> None:
    if stop_ids is not None and max(stop_ids.student + stop_ids.teacher) >= size:
        raise TrimtabError(f"stop ids {stop_ids.student} and {stop_ids.teacher} must lie below {size}, the vocabulary.")
