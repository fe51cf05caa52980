"""What an experiment declares, and how its verdict is reached.

An experiment is a claim about one method, measured with the same seeds for the method and its baselines:

    EXPERIMENT = Experiment(
        method="kron-sae",
        claim="KronSAE absorbs less than a dense TopK dictionary of the same width.",
        paper_figure="absorption score at L0 = 32: 0.129 against 0.233 (table 5)",
        metric="absorption score",
        higher_is_better=False,
        arms={"KronSAE": ("method", kron), "TopK": ("baseline", dense)},
    )

where `kron(seed)` and `dense(seed)` measure and return the metric.

The standard rule: let d be the paired difference, over seeds, of the first method arm and the baseline with the
best mean, positive when the method is better; [low, high] its t interval; s the smallest difference of interest.

    not shown      high < s
    shown          otherwise, if low > 0
    inconclusive   otherwise, and with one seed
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.results import ROLES, Arm, paired_difference

__all__ = ["VERDICTS", "Experiment", "comparison", "standard_verdict", "verdict"]

VERDICTS = ("shown", "not shown", "inconclusive")
COMPETING = ("method", "baseline")


@dataclass(frozen=True)
class Experiment:
    """One experiment. Raises TrimtabError for a declaration that cannot be run.

    method: slug of the method.
    claim: the published claim, a sentence.
    paper_figure: what the paper reports, in its own setting.
    metric: name of the headline figure.
    arms: for each arm its role, "method", "baseline" or "reference" (shown beside them, and not competed with),
        and the function that measures it with a seed. It returns the metric, or a mapping of figures that has
        `metric` among its keys; the others are kept.
    seeds, quick_seeds: of the full run and of `--quick`.
    smallest_difference: 0 or more, in units of the metric; a certain difference below it is "not shown".
    rule: a pure function of the arms that gives one of VERDICTS, in the place of the standard rule.
    attachments: writes figures or dictionary pages into the directory that it is given, after the arms, and
        returns their paths.
    """

    method: str
    claim: str
    paper_figure: str
    metric: str
    higher_is_better: bool
    arms: Mapping[str, tuple[str, Callable[[int], float | Mapping[str, float]]]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    quick_seeds: tuple[int, ...] = (0,)
    smallest_difference: float = 0.0
    rule: Callable[[Sequence[Arm]], str] | None = None
    attachments: Callable[[Path], Sequence[Path]] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.method):
            raise TrimtabError(f"method={self.method!r}: a slug of lower-case letters, digits and - is accepted.")
        for name in ("claim", "paper_figure", "metric"):
            if not getattr(self, name).strip():
                raise TrimtabError(f"{name} of experiment {self.method!r} is empty.")
        roles = [role for role, _ in self.arms.values()]
        for role in roles:
            if role not in ROLES:
                raise unknown(f"role of an arm of {self.method!r}", role, ROLES)
        if not set(roles) >= set(COMPETING):
            raise TrimtabError(f"arms of {self.method!r} have the roles {roles}: each of {COMPETING} is needed.")
        for name in ("seeds", "quick_seeds"):
            seeds = getattr(self, name)
            if not seeds or len(set(seeds)) != len(seeds):
                raise TrimtabError(f"{name}={seeds} of {self.method!r}: one or more different seeds are accepted.")
        if not 0 <= self.smallest_difference < math.inf:
            raise TrimtabError(f"smallest_difference={self.smallest_difference}: 0 or more is accepted.")


def standard_verdict(arms: Sequence[Arm], *, higher_is_better: bool, smallest_difference: float = 0.0) -> str:
    """The standard rule (see the head of this module) on arms of which none failed."""
    method, baseline = _headline(arms, higher_is_better)
    interval = paired_difference(method, baseline).interval
    if interval is None:
        return "inconclusive"
    low, high = interval if higher_is_better else (-interval[1], -interval[0])
    if high < smallest_difference:
        return "not shown"
    return "shown" if low > 0 else "inconclusive"


def verdict(experiment: Experiment, arms: Sequence[Arm]) -> str:
    """One of VERDICTS by the experiment's rule; "inconclusive" where an arm failed."""
    if any(arm.error is not None for arm in arms):
        return "inconclusive"
    if experiment.rule is None:
        return standard_verdict(
            arms,
            higher_is_better=experiment.higher_is_better,
            smallest_difference=experiment.smallest_difference,
        )
    found = experiment.rule(arms)
    if found not in VERDICTS:
        raise unknown(f"verdict of the rule of {experiment.method!r}", found, VERDICTS)
    return found


def comparison(arms: Sequence[Arm], *, higher_is_better: bool) -> str:
    """A sentence on the first method arm against the best baseline: both means, their difference, its interval."""
    failed = [arm.name for arm in arms if arm.error is not None]
    whole = [arm for arm in arms if arm.error is None]
    reproach = f"Failed: {', '.join(failed)}." if failed else ""
    if not {arm.role for arm in whole} >= set(COMPETING):
        return f"{reproach} Nothing is left to compare."
    method, baseline = _headline(whole, higher_is_better)
    difference = paired_difference(method, baseline)
    better = "higher" if higher_is_better else "lower"
    sentence = (
        f"{method.name} {method.mean:.4g} against {baseline.mean:.4g} of {baseline.name}, the best baseline "
        f"({better} is better): difference {difference.mean:+.4g}"
    )
    if difference.interval is None:
        return f"{reproach} {sentence}, from one seed, which gives no interval.".strip()
    low, high = difference.interval
    return f"{reproach} {sentence}, 95% interval {low:+.4g} to {high:+.4g} over {difference.n_seeds} seeds.".strip()


def _headline(arms: Sequence[Arm], higher_is_better: bool) -> tuple[Arm, Arm]:
    """The first method arm and the baseline with the best mean."""
    sign = 1 if higher_is_better else -1
    method = next(arm for arm in arms if arm.role == "method")
    baselines = [arm for arm in arms if arm.role == "baseline"]
    return method, max(baselines, key=lambda arm: -math.inf if arm.mean is None else sign * arm.mean)
