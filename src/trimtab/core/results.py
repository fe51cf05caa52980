"""Measured arms: a value for each seed, means with intervals, paired differences, tables and figures.

For values x_1 … x_n, one a seed, with mean m and sample standard deviation s:

    t interval           m ± t_{(1+c)/2, n-1} s / √n
    bootstrap interval   the (1-c)/2 and (1+c)/2 quantiles of the means of resamples of size n
    paired difference    the same of x_i - y_i, where x_i and y_i share a seed

c is the confidence, 0.95. The t interval is what tables show: with the handful of seeds that an experiment
has, the bootstrap's is too narrow. One value has no interval.
"""

from __future__ import annotations

import importlib.metadata
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.core.errors import TrimtabError, unknown

__all__ = [
    "ROLES",
    "Arm",
    "Difference",
    "bootstrap_interval",
    "environment",
    "figure_svg",
    "markdown_table",
    "paired_difference",
    "t_interval",
]

ROLES = ("method", "baseline", "reference")
CONFIDENCE = 0.95
PACKAGES = (
    "trimtab",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment, its `role` one of ROLES: `values[i]` was measured with `seeds[i]`.

    A reference is shown beside the others and not competed with, such as what is reached by giving up the constraint.

    `error` says why an arm failed; its values are those of the seeds before, and it has neither mean nor
    interval. Raises TrimtabError for another role, values that are not finite, and seeds that repeat or do not match.
    """

    name: str
    role: str
    values: Sequence[float | int]
    seeds: Sequence[int]
    error: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown("role", self.role, ROLES)
        if len(self.values) != len(self.seeds) or len(set(self.seeds)) != len(self.seeds):
            raise TrimtabError(
                f"arm {self.name!r} has {len(self.values)} values for seeds={list(self.seeds)}; accepted: one "
                "value for each seed, and each seed once."
            )
        if not self.values and self.error is None:
            raise TrimtabError(f"arm {self.name!r} has no values and no error.")
        if not all(math.isfinite(value) for value in self.values):
            raise TrimtabError(f"arm {self.name!r} has values={list(self.values)}: finite numbers are accepted.")
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        object.__setattr__(self, "seeds", tuple(self.seeds))

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if the arm failed."""
        return None if self.error is not None else math.fsum(self.values) / len(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The t interval of the mean; None for one value, and if the arm failed."""
        return None if self.error is not None else t_interval(self.values)

    def to_json(self) -> dict[str, Any]:
        """{"name", "role", "values", "seeds", "mean", "ci_low", "ci_high"}, and "error" if it failed."""
        low, high = self.interval or (None, None)
        entry: dict[str, Any] = {
            "name": self.name,
            "role": self.role,
            "values": list(self.values),
            "seeds": list(self.seeds),
        }
        entry |= {"mean": self.mean, "ci_low": low, "ci_high": high}
        return entry if self.error is None else entry | {"error": self.error}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Arm:
        """The arm that `to_json` wrote; mean and interval are computed again."""
        try:
            fields = {key: entry[key] for key in ("name", "role", "values", "seeds")}
        except KeyError as error:
            raise TrimtabError(f"arm {dict(entry)!r} lacks the key {error}.") from error
        return cls(**fields, error=entry.get("error"))


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms over `n_seeds` seeds, and its t interval (None for one seed)."""

    mean: float
    interval: tuple[float, float] | None
    n_seeds: int


def t_interval(values: Sequence[float | int], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval for the mean of `values`; None if there are fewer than two."""
    _check_confidence(confidence)
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    scale = float(np.std(np.asarray(values, np.float64), ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * scale
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float | int], confidence: float = CONFIDENCE, *, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile bootstrap interval for the mean of `values`; None if there are fewer than two.

    `seed` is that of the resampling, which is NumPy's default generator: the same arguments give the same
    interval.
    """
    _check_confidence(confidence)
    if n_resamples < 1:
        raise TrimtabError(f"n_resamples={n_resamples}: 1 or more resamples are accepted.")
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values, np.float64), (n_resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_difference(first: Arm, second: Arm) -> Difference:
    """`first` minus `second`, seed by seed; TrimtabError if their seeds differ or one of them failed."""
    for arm in (first, second):
        if arm.error is not None:
            raise TrimtabError(f"arm {arm.name!r} failed and cannot be compared: {arm.error}")
    if set(first.seeds) != set(second.seeds):
        raise TrimtabError(
            f"arms {first.name!r} and {second.name!r} have the seeds {list(first.seeds)} and "
            f"{list(second.seeds)}: pairing needs the same ones."
        )
    other = dict(zip(second.seeds, second.values, strict=True))
    differences = [value - other[seed] for seed, value in zip(first.seeds, first.values, strict=True)]
    return Difference(math.fsum(differences) / len(differences), t_interval(differences), len(differences))


def environment() -> dict[str, Any]:
    """What a figure was measured with: {"versions": {package: version}, "machine": {…}, "date": "2026-01-31"}.

    `machine` has `system`, `cpu`, `cores` (that this process may use), `threads` (of torch), `memory_gib` and
    `gpu` (names, or None). The date is in UTC.
    """
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a machine for GPU tests may lack TRL, say
    names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": ", ".join(names) or None,
    }
    return {"versions": versions, "machine": machine, "date": datetime.now(UTC).date().isoformat()}


def markdown_table(arms: Sequence[Arm], *, metric: str, higher_is_better: bool) -> str:
    """A Markdown table with a row for each arm: mean, interval and values. `rich.markdown` shows it too."""
    better = "higher" if higher_is_better else "lower"
    seeds = sorted({seed for arm in arms for seed in arm.seeds})
    lines = [
        f"| arm | role | {_cell(metric)} ({better} is better) | {CONFIDENCE:.0%} t interval | by seed |",
        "|---|---|---:|---:|---|",
    ]
    for arm in arms:
        mean, interval = "–" if arm.mean is None else f"{arm.mean:.4g}", "–"
        if arm.interval is not None:
            interval = f"{arm.interval[0]:.4g} to {arm.interval[1]:.4g}"
        values = ", ".join(f"{value:.4g}" for value in arm.values)
        if arm.error is not None:
            values = f"{values}; failed: {arm.error}".removeprefix("; ")
        lines.append(f"| {_cell(arm.name)} | {arm.role} | {mean} | {interval} | {_cell(values)} |")
    return "\n".join(lines) + f"\n\nSeeds: {', '.join(map(str, seeds)) or 'none'}.\n"


def figure_svg(arms: Sequence[Arm], *, metric: str, higher_is_better: bool) -> str:
    """A figure as SVG text, a row for each arm: small dots for seeds, a large one for the mean, the interval.

    The same arms give the same text. An arm that failed has a row that says so.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 1 + 0.45 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for row, arm in enumerate(arms):
            colour = "C0" if arm.role == "method" else "0.45"
            if arm.mean is None:
                axes.annotate("failed", (0.5, row), xycoords=("axes fraction", "data"), color="C3", va="center")
                continue
            axes.plot(arm.values, [row] * len(arm.values), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(arm.mean, row, "o", color=colour, markersize=8)
            if arm.interval is not None:
                axes.plot(arm.interval, [row, row], "-", color=colour, linewidth=2)
        axes.set_yticks(range(len(arms)), [_literal(arm.name) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel(f"{_literal(metric)} ({'higher' if higher_is_better else 'lower'} is better)")
        axes.grid(axis="x", alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise TrimtabError(f"confidence={confidence}: a number between 0 and 1 is accepted.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _literal(text: str) -> str:
    """`text` for matplotlib, which takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
