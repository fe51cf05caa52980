"""Ctrl-C that never lands in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruptible"]


class Interruptible:
    """Within `with Interruptible() as guard:`, SIGINT and SIGTERM raise KeyboardInterrupt, but not in `guard.whole()`.

    A signal that arrives inside `with guard.whole():` is raised at its end, so that what happens there happens wholly.
    Outside the main thread, where Python delivers no signals, this does nothing.
    """

    def __enter__(self) -> Interruptible:
        self._inside = False
        self._pending = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A part that is done wholly or not begun."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if self._pending:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._inside:
            self._pending = True
        else:
            raise KeyboardInterrupt
