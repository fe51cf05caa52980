"""When a reference moves, and how far: a pure function of the optimiser step.

Source: arXiv 2404.09656 and its official callback. Symbols: n = 1, 2, … the optimiser step that was just taken
(micro-batches do not count), alpha the policy's weight, tau the interval.

    at n = n_1, n_2, …, start < n <= stop:   reference <- alpha policy + (1 - alpha) reference
    n_0 = 0,   n_(k+1) = n_k + tau:          n mod tau = 0, while tau is constant

    soft    tau = 1            a reference that lags a policy of constant speed by (1 - alpha) / alpha steps
    hard    alpha = 1          a copy
    mixed   both               what TRL's defaults and its recipe for TR-DPO set, neither of the paper's two variants

Extensions of ours. tau may be a share of the run. alpha and tau may change in a straight line over the run's N steps,
from their first values at n = 0 to `final_alpha` and `final_tau` at n = N; the tau after n_k is that at n_k, rounded.
With `margin_threshold` an update waits until the batch's mean h = log-ratio of the chosen minus that of the rejected
completions has grown to the threshold (in nats).
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass

from trimtab.core.errors import TrimtabError

__all__ = ["UpdateSchedule"]


@dataclass(frozen=True)
class UpdateSchedule:
    """When and how far a reference moves.

    alpha: weight of the *policy*, in (0, 1]. 0 is accepted as the base method, and warns.
    tau: optimiser steps from update to update, an integer from 1 on.
    fraction: the interval as a share of the run's steps, in (0, 1], in the place of `tau`.
    start_step, stop_step: no update up to and including the one, and none after the other.
    margin_threshold: nats that the mean h of a batch must have reached.
    final_alpha, final_tau: what alpha and the interval have become at the end; None: what they were.

    Raises `TrimtabError` for anything else.
    """

    alpha: float | int = 0.6
    tau: int | float | None = 1
    fraction: float | int | None = None
    start_step: int = 0
    stop_step: int | None = None
    margin_threshold: float | int | None = None
    final_alpha: float | int | None = None
    final_tau: int | float | None = None

    def __post_init__(self) -> None:
        for name, alpha in (("alpha", self.alpha), ("final_alpha", self.final_alpha)):
            if alpha is not None and not 0 <= alpha <= 1:
                raise TrimtabError(f"{name}={alpha} must lie in (0, 1]: it is the policy's weight in the reference.")
        if not self.moves:
            warnings.warn("alpha=0: the reference never moves, as without a trust region.", stacklevel=3)
        if (self.tau is None) == (self.fraction is None):
            raise TrimtabError(f"tau={self.tau} and fraction={self.fraction}: one of the two is given.")
        for name, tau in (("tau", self.tau), ("final_tau", self.final_tau)):
            if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int) or tau < 1):
                raise TrimtabError(f"{name}={tau} must be an integer, 1 or more (optimiser steps).")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise TrimtabError(f"fraction={self.fraction} must lie in (0, 1]: it is a share of the run.")
        if self.start_step < 0 or (self.stop_step is not None and self.stop_step <= self.start_step):
            raise TrimtabError(
                f"start_step={self.start_step} and stop_step={self.stop_step}: the first is 0 or more, and below the "
                "second."
            )
        if self.margin_threshold is not None and not math.isfinite(self.margin_threshold):
            raise TrimtabError(f"margin_threshold={self.margin_threshold} must be finite (nats).")

    @property
    def moves(self) -> bool:
        """Whether alpha is ever above 0."""
        return bool(self.alpha or self.final_alpha)

    @property
    def averages(self) -> bool:
        """Whether an update is ever an average, neither a copy nor nothing."""
        return 0 < self.alpha < 1 or self.final_alpha not in (None, self.alpha)

    def interval(self, total_steps: int) -> int:
        """The first tau in optimiser steps, of a run of `total_steps`."""
        return int(self.tau) if self.tau is not None else max(1, round(self.fraction * total_steps))  # type: ignore[operator]

    def updates(self, total_steps: int) -> int:
        """How many updates a run of `total_steps` sees, if no threshold holds one back."""
        return sum(self.policy_weight(step, total_steps) > 0 for step in range(1, total_steps + 1))

    def policy_weight(self, step: int, total_steps: int, margin: float | int = math.inf) -> float:
        """alpha if the reference moves after step `step` = 1, 2, …, else 0; `margin` is the batch's mean h."""
        held_back = self.margin_threshold is not None and not margin >= self.margin_threshold
        outside = step <= self.start_step or (self.stop_step is not None and step > self.stop_step)
        if held_back or outside or not self._is_due(step, total_steps):
            return 0.0
        return min(1.0, _between(self.alpha, self.final_alpha, step / total_steps))

    def _is_due(self, step: int, total_steps: int) -> bool:
        if self.final_tau is None:
            return step % self.interval(total_steps) == 0
        return step in _steps_due(self, total_steps)


@functools.lru_cache(maxsize=64)
def _steps_due(schedule: UpdateSchedule, total_steps: int) -> frozenset[int]:
    """n_1, n_2, … up to `total_steps`."""
    first, step, found = schedule.interval(total_steps), 0, []
    while (step := step + round(_between(first, schedule.final_tau, step / total_steps))) <= total_steps:
        found.append(step)
    return frozenset(found)


def _between(first: float | int, last: float | int | None, share: float | int) -> float:
    return float(first if last is None else first + (last - first) * share)
