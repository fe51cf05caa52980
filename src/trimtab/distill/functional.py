"""The loss of on-policy distillation on plain tensors: reverse KL at given prefixes, whole or on k tokens.

Source: trust-region behaviour blending, arXiv 2605.31159; its 16 tokens of the student's and the surrogate `topk_pg`
are those of Li et al., arXiv 2604.13016, whose code (thunlp/OPD) is the only public account of the formula.

Symbols, at one prefix: p = softmax(student logits / T), q = softmax(teacher logits / T), S the ids of p's k largest,
P_S = sum of p over S, p_rest = 1 - P_S (q_rest likewise), pbar and qbar: p and q renormalised on S, sg: no gradient.

    full          sum_v p_v (log p_v - log q_v)
    topk_renorm   sum_S pbar (log pbar - log qbar)
    topk_tail     sum_S p (log p - log q) + p_rest (log p_rest - log q_rest)          0 <= topk_tail <= full
    topk_pg       sum_S sg(pbar (log p - log q)) exp(log p - sg(log p))               a policy gradient's surrogate

The gradient of `topk_pg` is sum_S pbar (log p - log q) grad log p. It is not that of `topk_renorm` (no mean is
subtracted), nor of the truncated sum (no sum_S grad p, and a factor 1 / P_S). With k = V all four have one gradient,
as sum_v grad p_v = 0.

The prefixes are those that some behaviour policy visited, and there are no importance weights: the divergence is
taken over all tokens, whichever was sampled. An id that both models mask (logit -inf) adds nothing, to the value and
to the gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.simplex import kl, tempered

__all__ = ["Estimator", "reverse_kl", "reverse_kl_from_statistics", "topk_statistics"]

Estimator = Literal["full", "topk_renorm", "topk_tail", "topk_pg"]


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    estimator: str = "full",
    k: int = 16,
    temperature: float | int = 1.0,
) -> Tensor:
    """KL(student || teacher) in nats at each prefix, [*batch], with a gradient to `student_logits` alone.

    - `student_logits`, `teacher_logits`: [*batch, vocab], of one shape; -inf masks an id.
    - `k`: the size of S, 1 to vocab; `full` does without it.

    Float32 or better. A prefix where the student has mass on an id that the teacher masks is +inf, with gradient 0.
    Raises `TrimtabError` for shapes that differ, an unknown estimator, a k out of range, and a temperature that is
    not positive and finite.
    """
    _check_estimator(estimator, get_args(Estimator))
    if estimator != "full":
        ids, log_q = topk_statistics(student_logits, teacher_logits, k, temperature)
        return reverse_kl_from_statistics(student_logits, ids, log_q, estimator=estimator, temperature=temperature)
    _check_pair(student_logits, teacher_logits, temperature)
    divergence: Tensor = _ReverseKL.apply(
        tempered(student_logits, temperature), tempered(teacher_logits.detach(), temperature)
    )
    return divergence


@torch.no_grad()
def topk_statistics(
    student_logits: Tensor, teacher_logits: Tensor, k: int = 16, temperature: float | int = 1.0
) -> tuple[Tensor, Tensor]:
    """All that a truncated loss needs of the teacher: S, [*batch, k] ids, and the teacher's log q there.

    log q is normalised over the whole vocabulary, in float32 or better. Raises as `reverse_kl` does.
    """
    _check_pair(student_logits, teacher_logits, temperature)
    if not 1 <= k <= student_logits.shape[-1]:
        raise TrimtabError(f"k={k} must lie in 1..{student_logits.shape[-1]}, the size of the vocabulary.")
    ids = student_logits.topk(k, dim=-1).indices
    return ids, _log_probs_at(ids, teacher_logits, temperature)


def reverse_kl_from_statistics(
    student_logits: Tensor,
    ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    estimator: str,
    temperature: float | int = 1.0,
) -> Tensor:
    """`reverse_kl` without the teacher's logits: `ids` and `teacher_log_probs`, [*batch, k], are `topk_statistics`.

    They may have been taken while decoding; then S is that of the student who decoded. Raises `TrimtabError` for
    the estimator "full", which needs all logits, and for shapes that do not fit.
    """
    _check_estimator(estimator, get_args(Estimator)[1:])
    _check_temperature(temperature)
    if ids.shape != teacher_log_probs.shape or ids.shape[:-1] != student_logits.shape[:-1]:
        raise TrimtabError(
            f"ids and teacher_log_probs have shapes {list(ids.shape)} and {list(teacher_log_probs.shape)}: "
            f"both must be {[*student_logits.shape[:-1], 'k']}."
        )
    log_p = _log_probs_at(ids, student_logits, temperature)
    log_q = teacher_log_probs.detach().to(log_p.dtype)
    if estimator == "topk_pg":
        return _policy_gradient(log_p, log_q)
    if estimator == "topk_tail":
        return kl(_with_rest(log_p), _with_rest(log_q))
    # Where the teacher has nothing on S, its total is -inf: log q - total must stay -inf.
    total = log_q.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(log_q.dtype).min)
    return kl(log_p.log_softmax(-1), log_q - total)


class _ReverseKL(torch.autograd.Function):
    """`full`, with its gradient p_v (log p_v - log q_v - KL) written down, which is all that is kept for it."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        log_p = student_logits.log_softmax(-1)
        p, log_ratio = log_p.exp(), log_p.sub_(teacher_logits.log_softmax(-1))
        # Without mass there is nothing to add, also where log p - log q is -inf + inf.
        log_ratio.masked_fill_(p == 0, 0.0)
        divergence = torch.linalg.vecdot(p, log_ratio)
        if ctx.needs_input_grad[0]:
            gradient = log_ratio.sub_(divergence.unsqueeze(-1)).mul_(p)
            ctx.save_for_backward(gradient.masked_fill_((divergence == torch.inf).unsqueeze(-1), 0.0))
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient.unsqueeze(-1), None


def _log_probs_at(ids: Tensor, logits: Tensor, temperature: float | int) -> Tensor:
    """log softmax(logits / temperature) at `ids`, without a log-softmax of the size of the logits."""
    logits = tempered(logits, temperature)
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def _with_rest(log_p: Tensor) -> Tensor:
    """log p on S, and behind it the log of what is left of 1."""
    # At k = V rounding would leave nothing, or less: the logarithm's argument is at least one rounding step.
    mass = log_p.exp().sum(-1, keepdim=True).clamp_max(1 - torch.finfo(log_p.dtype).eps)
    return torch.cat([log_p, (-mass).log1p()], -1)


def _policy_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    outside = log_p == -torch.inf
    lacking = (log_q == -torch.inf) & ~outside
    log_p = log_p.masked_fill(outside, 0.0)
    with torch.no_grad():
        weight = log_p.masked_fill(outside, -torch.inf).softmax(-1)
        cost = weight * (log_p - log_q).masked_fill(outside | lacking, 0.0)
    surrogate = (cost * (log_p - log_p.detach()).exp()).sum(-1)
    return torch.where(lacking.any(-1), torch.inf, surrogate)


def _check_pair(student_logits: Tensor, teacher_logits: Tensor, temperature: float | int) -> None:
    _check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise TrimtabError(f"student_logits and teacher_logits have shapes {shapes}: they must be equal.")


def _check_temperature(temperature: float | int) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise TrimtabError(f"temperature={temperature} must be positive and finite.")


def _check_estimator(estimator: str, accepted: tuple[str, ...]) -> None:
    if estimator not in accepted:
        raise unknown("estimator", estimator, accepted)
