"""Who writes the prefixes of on-policy distillation: trust-region behaviour blending and its baselines.

Source: trust-region behaviour blending (TRB), arXiv 2605.31159; speculative knowledge distillation (SKD), arXiv
2410.11325, with the proposal of one token; the fixed mixture is that of MiniLLM, arXiv 2306.08543.

Symbols, at one prefix: p the student, q the teacher, mu who writes; k the optimiser step, from 0.

    Vanilla             mu = p
    TrustRegion         mu = argmin KL(mu || q)  subject to  KL(mu || p) <= eps_k,   eps_k = eps_0 max(0, 1 - k/K)
    SKD                 mu = p 1[top] + (1 - sum_top p) q^(1/tau) / Z                top: the K likeliest of q
    TemperatureWarmup   mu = p^(1/tau_k) / Z,   tau_k = tau_0 + (1 - tau_0) min(1, k/K)
    TeacherMixture      mu = alpha q + (1 - alpha) p
    TeacherOnly         mu = q, for the first steps

SKD lets the student propose a token and, where that is none of `top`, replaces it by a sample of the teacher's at
temperature tau: mu is the distribution of what comes out. Budgets are in nats per token. What the student may not
write (p = 0) nobody writes: q is the teacher's distribution over the other tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.schedules import linear_decay
from trimtab.core.simplex import kl, trust_region

__all__ = [
    "SKD",
    "Behaviour",
    "RolloutPolicy",
    "TeacherMixture",
    "TeacherOnly",
    "TemperatureWarmup",
    "TrustRegion",
    "Vanilla",
]


@dataclass(frozen=True)
class Behaviour:
    """Who writes the next token of each row.

    `log_mu` [rows, vocab]; `blend_weight` [rows], the trust region's beta, None for other policies; `divergence`
    [rows], KL(mu || p) in nats.
    """

    log_mu: Float[Tensor, "rows vocab"]
    blend_weight: Float[Tensor, " rows"] | None
    divergence: Float[Tensor, " rows"]


class RolloutPolicy(ABC):
    """Who writes the prefixes of an optimiser step. A policy keeps no state: all follows from `step`."""

    @abstractmethod
    def needs_teacher(self, step: int) -> bool:
        """Whether the teacher has a say at `step`; if not, the student alone writes, and no teacher need run."""

    def temperature(self, step: int) -> float:
        """The student's sampling temperature at `step`, a factor beside the run's own."""
        return 1.0

    @abstractmethod
    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        """mu at `step`, of the whole log-probabilities of student and teacher, tempered already; 0 where p is."""


@dataclass(frozen=True)
class Vanilla(RolloutPolicy):
    """The student writes: plain on-policy distillation."""

    def needs_teacher(self, step: int) -> bool:
        return False

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        return _the_student(log_p)


@dataclass(frozen=True)
class TrustRegion(RolloutPolicy):
    """TRB: as near to the teacher as a budget of KL(mu || p) allows, which shrinks to 0 over `warmup_steps`.

    `schedule` is "linear" or "constant"; with the latter the budget stays at `epsilon` throughout (the baseline of a
    fixed budget), whatever `warmup_steps`. Raises `TrimtabError` for an `epsilon` that is negative or not finite,
    negative `warmup_steps` and another schedule.
    """

    epsilon: float | int = 0.02
    warmup_steps: int = 50
    schedule: str = "linear"

    def __post_init__(self) -> None:
        check_budget("epsilon", self.epsilon)
        check_whole("warmup_steps", self.warmup_steps)
        if self.schedule not in ("linear", "constant"):
            raise unknown("schedule", self.schedule, ("linear", "constant"))

    def budget(self, step: int) -> float:
        """eps_k in nats per token."""
        return self.epsilon * (1.0 if self.schedule == "constant" else linear_decay(step, self.warmup_steps))

    def needs_teacher(self, step: int) -> bool:
        return self.budget(step) > 0

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        if not self.needs_teacher(step):
            return _the_student(log_p)
        return Behaviour(*trust_region(log_p, log_q, self.budget(step)))


@dataclass(frozen=True)
class SKD(RolloutPolicy):
    """Speculative knowledge distillation: the teacher replaces what is none of its `top_k` likeliest tokens.

    `teacher_temperature` is tau, of the replacements, beside the run's own temperature. Raises `TrimtabError`
    for `top_k` < 1 and a temperature that is not positive and finite.
    """

    top_k: int = 25
    teacher_temperature: float | int = 0.6

    def __post_init__(self) -> None:
        check_whole("top_k", self.top_k, least=1)
        _check_temperature("teacher_temperature", self.teacher_temperature)

    def needs_teacher(self, step: int) -> bool:
        return True

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        log_q = _within(log_q, log_p)
        top = log_q.topk(min(self.top_k, log_q.shape[-1]), dim=-1).indices
        # Summed from what is rejected: 1 minus what is kept would be rounding alone where nearly all is kept.
        rejected = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        kept = torch.full_like(log_p, -torch.inf).scatter_(-1, top, log_p.gather(-1, top))
        replacement = (log_q / self.teacher_temperature).log_softmax(-1)
        return _measured(torch.logaddexp(kept, replacement.add_(rejected)), log_p)


@dataclass(frozen=True)
class TemperatureWarmup(RolloutPolicy):
    """The student writes, at a temperature that rises from `initial` to 1 over `steps`.

    Raises `TrimtabError` for an `initial` that is not positive and finite, and for negative `steps`.
    """

    initial: float | int = 0.8
    steps: int = 25

    def __post_init__(self) -> None:
        _check_temperature("initial", self.initial)
        check_whole("steps", self.steps)

    def needs_teacher(self, step: int) -> bool:
        return False

    def temperature(self, step: int) -> float:
        return 1 - (1 - self.initial) * linear_decay(step, self.steps)

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        return _the_student(log_p)


@dataclass(frozen=True)
class TeacherMixture(RolloutPolicy):
    """MiniLLM's: each token is the teacher's with probability `teacher_weight`, else the student's.

    Raises `TrimtabError` for a weight outside [0, 1].
    """

    teacher_weight: float | int = 0.2

    def __post_init__(self) -> None:
        if not (isinstance(self.teacher_weight, Real) and 0 <= self.teacher_weight <= 1):
            raise TrimtabError(f"teacher_weight={self.teacher_weight!r} must lie in [0, 1].")

    def needs_teacher(self, step: int) -> bool:
        return self.teacher_weight > 0

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        teacher, student = (math.log(w) if w else -math.inf for w in (self.teacher_weight, 1 - self.teacher_weight))
        log_q = _within(log_q, log_p)
        return _measured(torch.logaddexp(log_q + teacher, log_p + student), log_p)


@dataclass(frozen=True)
class TeacherOnly(RolloutPolicy):
    """The teacher writes for the first `steps`, then the student: the answers of a supervised warm-up.

    Raises `TrimtabError` for negative `steps`.
    """

    steps: int

    def __post_init__(self) -> None:
        check_whole("steps", self.steps)

    def needs_teacher(self, step: int) -> bool:
        return step < self.steps

    def log_behaviour(
        self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], step: int
    ) -> Behaviour:
        return _measured(_within(log_q, log_p), log_p) if self.needs_teacher(step) else _the_student(log_p)


def _the_student(log_p: Tensor) -> Behaviour:
    return Behaviour(log_p, None, log_p.new_zeros(log_p.shape[:-1]))


def _within(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The teacher's distribution over what the student may write; itself where that is everything."""
    outside = log_p == -torch.inf
    return log_q.masked_fill(outside, -torch.inf).log_softmax(-1) if bool(outside.any()) else log_q


def _measured(log_mu: Tensor, log_p: Tensor) -> Behaviour:
    return Behaviour(log_mu, None, kl(log_mu, log_p))


def check_budget(name: str, value: Any) -> None:
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
        raise TrimtabError(f"{name}={value!r} must be finite and 0 or more (nats per token).")


def check_whole(name: str, value: Any, least: int = 0) -> None:
    if not (isinstance(value, Integral) and int(value) >= least):
        raise TrimtabError(f"{name}={value!r} must be a whole number, {least} or more.")


def _check_temperature(name: str, value: Any) -> None:
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) > 0):
        raise TrimtabError(f"{name}={value!r} must be positive and finite.")
