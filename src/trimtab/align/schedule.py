"""When a reference moves, and how far: a pure function of the optimiser step.

Source: arXiv 2404.09656 and its official callback. Symbols: n = 1, 2, … the optimiser step that was just taken
(micro-batches do not count), alpha the policy's weight, tau the interval.

    at n mod tau = 0, start < n <= stop:   reference <- alpha policy + (1 - alpha) reference

    soft    tau = 1            a reference that lags a policy of constant speed by (1 - alpha) / alpha steps
    hard    alpha = 1          a copy
    mixed   both               what TRL's defaults and its recipe for TR-DPO set, neither of the paper's two variants

Two extensions of ours: tau may be a share of the run, and with `margin_threshold` an update waits until the batch's
mean h = log-ratio of the chosen minus that of the rejected completions has grown to the threshold (in nats).
"""

from __future__ import annotations

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

    Raises `TrimtabError` for anything else.
    """

    alpha: float | int = 0.6
    tau: int | float | None = 1
    fraction: float | int | None = None
    start_step: int = 0
    stop_step: int | None = None
    margin_threshold: float | int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise TrimtabError(f"alpha={self.alpha} must lie in (0, 1]: it is the policy's weight in the reference.")
        if self.alpha == 0:
            warnings.warn("alpha=0: the reference never moves, as without a trust region.", stacklevel=3)
        if (self.tau is None) == (self.fraction is None):
            raise TrimtabError(f"tau={self.tau} and fraction={self.fraction}: one of the two is given.")
        if self.tau is not None and (isinstance(self.tau, bool) or not isinstance(self.tau, int) or self.tau < 1):
            raise TrimtabError(f"tau={self.tau} must be an integer, 1 or more (optimiser steps).")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise TrimtabError(f"fraction={self.fraction} must lie in (0, 1]: it is a share of the run.")
        if self.start_step < 0 or (self.stop_step is not None and self.stop_step <= self.start_step):
            raise TrimtabError(
                f"start_step={self.start_step} and stop_step={self.stop_step}: the first is 0 or more, and below the "
                "second."
            )
        if self.margin_threshold is not None and not math.isfinite(self.margin_threshold):
            raise TrimtabError(f"margin_threshold={self.margin_threshold} must be finite (nats).")

    def interval(self, total_steps: int) -> int:
        """tau in optimiser steps, of a run of `total_steps`."""
        return int(self.tau) if self.tau is not None else max(1, round(self.fraction * total_steps))  # type: ignore[operator]

    def updates(self, total_steps: int) -> int:
        """How many updates a run of `total_steps` sees, if no threshold holds one back."""
        if self.alpha == 0:
            return 0
        tau, last = self.interval(total_steps), min(total_steps, self.stop_step or total_steps)
        return max(0, last // tau - self.start_step // tau)

    def policy_weight(self, step: int, total_steps: int, margin: float | int = math.inf) -> float:
        """alpha if the reference moves after step `step` = 1, 2, …, else 0; `margin` is the batch's mean h."""
        held_back = self.margin_threshold is not None and not margin >= self.margin_threshold
        outside = step <= self.start_step or (self.stop_step is not None and step > self.stop_step)
        if held_back or outside or step % self.interval(total_steps):
            return 0.0
        return float(self.alpha)
