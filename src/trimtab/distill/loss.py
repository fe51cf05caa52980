"""Reverse KL of hidden states: logits are projected a few positions at a time, and never stored for all of them.

With h_S, h_T the last hidden states of student and teacher at the same positions, and a head that makes logits of
them,

    l(h) = cap tanh(s (W h + b) / cap)          s: the model's logit scale; without a cap, s (W h + b)

logits are divided by the temperature, brought to one vocabulary with one stop id (`trimtab.distill.eos`), and compared
(`trimtab.distill.functional`). The gradient to h_S, W_S and b_S is taken along with the value, a chunk at a time, so
that each logit is computed once and what is kept for the backward pass has the size of h_S and of W_S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from trimtab.core.simplex import entropy, tempered
from trimtab.distill.eos import StopIds, canonicalise
from trimtab.distill.functional import reverse_kl, reverse_kl_from_statistics

__all__ = ["Comparison", "Head", "reverse_kl_of_hidden", "reverse_kl_of_statistics", "teacher_view"]

# Logits of one model that exist at a time.
_LOGITS = 2**25


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: `weight` [vocab, d], `bias` [vocab], the factor and the cap."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """A causal LM's, with what its config says of logits."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        bias = getattr(head, "bias", None)
        return cls(_whole(head.weight), None if bias is None else _whole(bias), _scale(config), _softcap(config))

    def finished(self, projection: Tensor) -> Tensor:
        """Logits of W h + b."""
        logits = projection if self.scale == 1 else projection * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Of `hidden` [rows, d], in float32 or better; `weight` is the head's in the dtype to compute in."""
        return self.finished(_projection(hidden.to(weight.device, weight.dtype), weight, self.bias))


@dataclass(frozen=True)
class Comparison:
    """How two models' logits are compared: the estimator and its k, the temperature, stop ids, common vocabulary."""

    estimator: str = "full"
    k: int = 16
    temperature: float | int = 1.0
    stop_ids: StopIds | None = None
    vocab_size: int | None = None

    @property
    def is_trls(self) -> bool:
        """Whether TRL's own loss compares so: every token, of logits that are over one vocabulary with one stop."""
        one_stop = self.stop_ids is None or not self.stop_ids.masked
        return self.estimator == "full" and one_stop and self.vocab_size is None

    def alike(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both at the temperature, over one vocabulary with one stop id."""
        ours, theirs = (tempered(logits, self.temperature) for logits in (student_logits, teacher_logits))
        return canonicalise(ours, theirs, self.stop_ids, self.vocab_size)


def reverse_kl_of_hidden(
    student_hidden: Tensor, student_head: Head, teacher_hidden: Tensor, teacher_head: Head, comparison: Comparison
) -> tuple[Tensor, Tensor]:
    """The sum over positions of KL(student || teacher), and the student's entropy at each, [positions], in nats.

    `student_hidden` [positions, d], `teacher_hidden` [positions, d_teacher]. The sum has a gradient to the student's
    hidden states and head. Half-precision input is projected as it is, or as autocast has it, with float32 results.
    """
    gathered = (teacher_head.weight, teacher_head.bias)
    with maybe_gather_lm_head_ctx(*gathered):
        weight = teacher_head.weight.to(_dtype(teacher_hidden))

        def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                theirs = teacher_head.logits(teacher_hidden[rows], weight).to(logits.device)
            ours, theirs = comparison.alike(student_head.finished(logits), theirs)
            return reverse_kl(ours, theirs, estimator=comparison.estimator, k=comparison.k), entropy(
                ours.detach().log_softmax(-1)
            )

        return _project(of_logits, student_hidden, student_head)


def reverse_kl_of_statistics(
    student_hidden: Tensor, student_head: Head, ids: Tensor, teacher_log_probs: Tensor, comparison: Comparison
) -> tuple[Tensor, Tensor]:
    """As `reverse_kl_of_hidden`, of the teacher's statistics [positions, k] in place of the teacher."""

    ids, teacher_log_probs = (x.to(student_head.weight.device) for x in (ids, teacher_log_probs))

    def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = student_head.finished(logits)
        ours, _ = comparison.alike(logits, logits.detach())
        divergence = reverse_kl_from_statistics(
            ours, ids[rows], teacher_log_probs[rows], estimator=comparison.estimator
        )
        return divergence, entropy(ours.detach().log_softmax(-1))

    return _project(of_logits, student_hidden, student_head)


@torch.no_grad()
def teacher_view(hidden: Tensor, head: Head, tokens: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """The teacher's log q of `tokens` [positions] and its entropy there, in nats, from `hidden` [positions, d]."""
    stop_ids = comparison.stop_ids
    if stop_ids is not None and stop_ids.masked:  # each of the student's stop ids is the one stop event
        own = torch.tensor(stop_ids.student, device=tokens.device)
        tokens = torch.where(torch.isin(tokens, own), stop_ids.written, tokens)
    log_probs, entropies = [], []
    dtype = _dtype(hidden)
    with maybe_gather_lm_head_ctx(head.weight, head.bias), torch.autocast(hidden.device.type, enabled=False):
        weight = head.weight.to(dtype)
        for rows in _chunks(hidden, weight):
            logits = head.logits(hidden[rows], weight)
            log_q = comparison.alike(logits, logits)[1].log_softmax(-1)
            log_probs.append(log_q.gather(-1, tokens[rows].to(log_q.device).unsqueeze(-1)).squeeze(-1))
            entropies.append(entropy(log_q))
    return torch.cat(log_probs), torch.cat(entropies)


# -- projection ------------------------------------------------------------------------------------


def _project(
    of_logits: Callable[[Tensor, slice], tuple[Tensor, Tensor]], hidden: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        hidden = hidden.to(head.weight.device)
        result: tuple[Tensor, Tensor] = _Projected.apply(
            of_logits, torch.is_grad_enabled(), _dtype(hidden), hidden, head.weight, head.bias
        )
        return result


class _Projected(torch.autograd.Function):
    """The sum of a function of W h + b over rows, and a second one without a gradient for each row."""

    @staticmethod
    def forward(
        ctx: Any,
        of_logits: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        differentiable: bool,
        dtype: torch.dtype,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[3:]]
        given = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(x, dtype=exact) if want and x is not None else None
            for x, want in zip(given, wanted, strict=True)
        ]
        factor, rows_in = weight.to(dtype), hidden.to(dtype)
        total, others = hidden.new_zeros((), dtype=exact), [hidden.new_zeros(0, dtype=exact)]
        # What is computed in half precision is said here; autocast would round sums over the vocabulary as well.
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                logits = _projection(rows_in[rows], factor, bias).requires_grad_(any(wanted))
                with torch.set_grad_enabled(any(wanted)):
                    values, other = of_logits(logits, rows)
                total += values.detach().sum()
                others.append(other)
                if any(wanted):
                    (gradient,) = torch.autograd.grad(values, logits, torch.ones_like(values))
                    _add_gradients(gradients, gradient, rows, rows_in, factor)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in given]
        entropies = torch.cat(others)
        ctx.mark_non_differentiable(entropies)
        return total, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, None, *scaled


def _add_gradients(
    gradients: list[Tensor | None], gradient: Tensor, rows: slice, hidden: Tensor, weight: Tensor
) -> None:
    """Add what `gradient` [rows, vocab], to the projection, means for hidden states, weight and bias."""
    of_hidden, of_weight, of_bias = gradients
    narrow = gradient.to(weight.dtype)
    if of_hidden is not None:
        _add_product(of_hidden[rows], narrow, weight)
    if of_weight is not None:
        _add_product(of_weight, narrow.t(), hidden[rows])
    if of_bias is not None:
        of_bias += gradient.sum(0)


def _projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W h + b, [rows, vocab], in float32 or better."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    size = (len(hidden), len(weight))
    out = hidden.new_zeros(size, dtype=exact) if bias is None else bias.detach().to(exact).repeat(len(hidden), 1)
    _add_product(out, hidden, weight.t())
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, where a product of half-precision factors is not rounded to theirs."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, _LOGITS // len(weight))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


# -- a model's head --------------------------------------------------------------------------------


def _whole(parameter: Tensor) -> Tensor:
    """Under FSDP a parameter is in parts; put together here, once, also for the gradient's way back."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _scale(config: Any) -> float:
    """The factor before the softmax, which models name differently."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)
