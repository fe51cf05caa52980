"""Schedules: pure functions of the step index that return a multiplier of the peak value.

A step index k starts at 0; `total` is the number of steps. Where a schedule warms up or anneals over the
whole run it is a function of x = (k + 1) / total, the share of the run that is done after the step, so that
the first step is not lost on a multiplier of 0 and the last one gets the schedule's end. A multiplier of a
learning rate goes into `torch.optim.lr_scheduler.LambdaLR`; since each is a function of k alone, a resumed
run continues exactly.

    linear_decay         max(0, 1 - k/K)
    warmup_constant      min(1, (k + 1) / W)
    warmup_cosine        x / w up to w, then floor + (1 - floor) (1 + cos(pi (x - w) / (1 - w))) / 2
    warmup_hold_decay    x / w up to w, then 1, then (1 - x) / d in the last share d
"""

from __future__ import annotations

import math

from trimtab.core.errors import TrimtabError

__all__ = ["linear_decay", "warmup_constant", "warmup_cosine", "warmup_hold_decay"]


def linear_decay(step: int, total: int) -> float:
    """max(0, 1 - step/total): 1 at step 0, 0 from step `total` on, and 0 throughout if `total` is 0.

    For trb: the trust-region budget is epsilon_0 times this, and the baseline's temperature warm-up from
    tau_0 to 1 is 1 - (1 - tau_0) times this. Raises `TrimtabError` for a negative argument.
    """
    _check("step", step, 0)
    _check("total", total, 0)
    return 1 - step / total if step < total else 0.0


def warmup_constant(step: int, warmup_steps: int) -> float:
    """A linear rise to 1 at step `warmup_steps - 1`, then 1; all 1 if `warmup_steps` is 0.

    For bias-steering (3 % of the steps), tr-align, ne-dreamer and star-diffusion. Raises `TrimtabError` for
    a negative argument.
    """
    _check("step", step, 0)
    _check("warmup_steps", warmup_steps, 0)
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def warmup_cosine(step: int, total: int, warmup_fraction: float | int = 0.1, floor: float | int = 0.0) -> float:
    """A linear rise over the first `warmup_fraction` of the steps, then half a cosine from 1 down to `floor`.

    For kron-sae and hierarchical-topk (10 %, a learning rate from 8e-4 to 1e-6, which is a floor of
    1e-6 / 8e-4), lime, varan (5 %) and rebased (no warm-up). The last step, and any after it, gets `floor`
    (so does a run of one step, unless it is all warm-up). `warmup_fraction` and `floor` lie in [0, 1];
    raises `TrimtabError` for others, a negative `step` and `total` < 1.
    """
    x = _share_done(step, total)
    _check_share("warmup_fraction", warmup_fraction)
    _check_share("floor", floor)
    if x <= warmup_fraction:
        return x / warmup_fraction
    return floor + (1 - floor) * (1 + math.cos(math.pi * (x - warmup_fraction) / (1 - warmup_fraction))) / 2


def warmup_hold_decay(step: int, total: int, warmup_fraction: float | int, decay_fraction: float | int) -> float:
    """A linear rise over the first `warmup_fraction`, 1, and a linear fall to 0 over the last `decay_fraction`.

    For sae-boost (1,000 steps of warm-up, decay over the last 20 %) and, with `decay_fraction` the rest of
    the run, the plain warm-up and linear decay of palbert, lime and weight-squeezing. The last step, and
    any after it, gets 0 unless there is no decay. Both fractions lie in [0, 1], and so does
    their sum; raises `TrimtabError` for others, a negative `step` and `total` < 1.
    """
    x = _share_done(step, total)
    _check_share("warmup_fraction", warmup_fraction)
    _check_share("decay_fraction", decay_fraction)
    # 0.1 + 0.9 is 1, but not every such pair is in floating point.
    if warmup_fraction + decay_fraction > 1 + 1e-9:
        raise TrimtabError(
            f"warmup_fraction={warmup_fraction} and decay_fraction={decay_fraction} must add up to at most 1."
        )
    rise = x / warmup_fraction if warmup_fraction else 1.0
    fall = (1 - x) / decay_fraction if decay_fraction else 1.0
    return min(rise, 1.0, fall)


def _share_done(step: int, total: int) -> float:
    _check("step", step, 0)
    _check("total", total, 1)
    return min(step + 1, total) / total


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise TrimtabError(f"{name}={value} must be at least {least}.")


def _check_share(name: str, value: float | int) -> None:
    if not 0 <= value <= 1:
        raise TrimtabError(f"{name}={value} must lie in [0, 1].")
