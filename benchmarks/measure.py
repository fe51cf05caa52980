"""What the benchmarks share: taking times in turns, a row for each figure, its target, its table and file.

Everything that is compared is measured in one run and in turns (A B A B ...), so that a machine that slows down does so
for both; a figure is the median of its repeats. CPU seconds count all threads, and child processes that have ended.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

__all__ = ["RESULTS", "Row", "Target", "Times", "cpu_seconds", "in_turns", "print_table", "read_rows", "write_rows"]

RESULTS = Path(__file__).with_name("results")


# -- times -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Wall and CPU seconds of each repeat."""

    wall: list[float]
    cpu: list[float]

    @property
    def wall_median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def in_turns(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Call each function once without measuring, then all of them in turns, `repeats` times."""
    for function in functions.values():
        function()
    taken: dict[str, Times] = {name: Times([], []) for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            function()
            taken[name].cpu.append(cpu_seconds() - cpu)
            taken[name].wall.append(time.perf_counter() - wall)
    return taken


def cpu_seconds() -> float:
    """CPU seconds of this process until now, and of its child processes that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A bound on one of: ours; ratio; difference = ours - peer; distance = |ours - peer|."""

    quantity: Literal["ours", "ratio", "difference", "distance"]
    relation: Literal["<=", ">="]
    bound: float

    def met(self, row: Row) -> bool:
        value = getattr(row, self.quantity)
        if value is None:
            raise ValueError(f"row {row.name!r} has no {self.quantity}, and its target is {self}")
        return bool(value <= self.bound if self.relation == "<=" else value >= self.bound)

    def __str__(self) -> str:
        return f"{self.quantity} {self.relation} {self.bound:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    ours, peer: medians over `repeats` in `unit`; the peer's is None where a bound is all there is.
    cpu_seconds, wall_seconds: what the measured repeats behind the figure took, both sides together.
    target: None for a figure that only informs.
    """

    name: str
    unit: str
    ours: float
    peer: float | None = None
    peer_version: str | None = None
    target: Target | None = None
    repeats: int
    seeds: int = 1
    cpu_seconds: float
    wall_seconds: float

    @property
    def ratio(self) -> float | None:
        return None if not self.peer else self.ours / self.peer

    @property
    def difference(self) -> float | None:
        return None if self.peer is None else self.ours - self.peer

    @property
    def distance(self) -> float | None:
        return None if self.difference is None else abs(self.difference)

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        return None if self.target is None else self.target.met(self)

    def to_json(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Every field and property, and `environment` ("versions", "machine", "date")."""
        named = asdict(self) | {"target": None if self.target is None else str(self.target)}
        return named | {"ratio": self.ratio, "difference": self.difference, "met": self.met} | dict(environment)


def write_rows(script: str, rows: Sequence[Row], *, directory: Path = RESULTS) -> Path:
    """Write `rows` to `directory`/`script`.json as a list, in place of what was there."""
    from trimtab.core.results import environment

    directory.mkdir(exist_ok=True)
    path = directory / f"{script}.json"
    where = environment()
    path.write_text(json.dumps([row.to_json(where) for row in rows], indent=2) + "\n", encoding="utf-8")
    return path


def read_rows(script: str, *, directory: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows that `write_rows` wrote; none if it never did."""
    path = directory / f"{script}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def print_table(title: str, rows: Sequence[Row]) -> None:
    """The rows on standard output."""
    table = Table("figure", "ours", "peer", "unit", "ratio", "target", "met", title=title, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        peer = "" if row.peer is None else f"{row.peer:,.4g}"
        target = "" if row.target is None else str(row.target)
        table.add_row(
            row.name, f"{row.ours:,.4g}", peer, row.unit, ratio, target, {None: "", True: "yes"}.get(row.met, "NO")
        )
    Console(width=None if Console().is_terminal else 140).print(table)
