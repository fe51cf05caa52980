"""Progress of long work on standard error: a rich bar with rate and time left; a line a minute where no one looks.

Of several processes only the first speaks.
"""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

__all__ = ["Progress", "console"]

SECONDS_BETWEEN_LINES = 60.0


def console(*, stderr: bool = False) -> Console:
    """Where this process prints: nowhere, if it is not the first of several (RANK, as torchrun sets it)."""
    return Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")


class Progress:
    """`with Progress("training", 300_000, "tokens") as bar: bar.advance(2048, "loss 0.4")`.

    done: units that an earlier, interrupted run has done; they count for the bar, not for the rate.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._done_before = done
        self._console = console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal or self._console.quiet,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rate="", note="")

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, units: int, note: str = "") -> None:
        """Count `units` more; `note` stands behind the bar."""
        now = time.monotonic()
        self._done += units
        rate = f"{(self._done - self._done_before) / max(now - self._start, 1e-9):,.0f} {self._unit}/s"
        self._bar.update(self._task, completed=self._done, rate=rate, note=note)
        if not self._console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate}  {note}")
