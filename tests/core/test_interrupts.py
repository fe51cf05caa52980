"""Signals wait for whole parts, handlers go back; progress counts what was done and speaks where no one looks."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest

from trimtab.core import progress as progress_module
from trimtab.core.interrupts import Interruptible
from trimtab.core.progress import Progress

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handlers_go_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int) -> None:
    """The signal to this process; Python runs its handler before the next statement."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_whole_parts_interrupts_at_once(number: int) -> None:
    done = []

    def work() -> None:
        with Interruptible():
            done.append("before")
            send(number)
            done.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["before"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_a_whole_part_waits_for_its_end(number: int) -> None:
    done = []

    def work() -> None:
        with Interruptible() as guard:
            for step in range(3):
                with guard.whole():
                    done.append(f"begin {step}")
                    if step == 1:
                        send(number)
                        send(number)
                    done.append(f"end {step}")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["begin 0", "end 0", "begin 1", "end 1"]


def test_an_error_within_a_whole_part_is_not_hidden_by_a_waiting_signal() -> None:
    def part() -> None:
        with Interruptible() as guard, guard.whole():
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        part()


def test_a_signal_that_waited_is_forgotten_by_the_next_guard() -> None:
    guard = Interruptible()
    with pytest.raises(KeyboardInterrupt), guard, guard.whole():
        send(signal.SIGINT)
    done = []
    with guard, guard.whole():
        done.append("whole")
    assert done == ["whole"]


def test_handlers_go_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def work() -> None:
        with Interruptible():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    done = []

    def work() -> None:
        with Interruptible() as guard, guard.whole():
            done.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


# -- progress --------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_where_no_one_looks_a_line_a_minute_on_standard_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 10_000, "tokens") as bar:
        for _ in range(5):
            clock.now += 25.0
            bar.advance(1_000, "loss 0.4")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["training: 3,000 of 10,000 tokens, 40 tokens/s  loss 0.4"]


def test_what_an_earlier_run_did_counts_for_the_bar_and_not_for_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("training", 10_000, "tokens", done=6_000) as bar:
        clock.now += 100.0
        bar.advance(500)
    assert capsys.readouterr().err.strip() == "training: 6,500 of 10,000 tokens, 5 tokens/s"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluating", 10, "tokens") as bar:
        bar.advance(10)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_on_a_terminal_a_bar_with_rate_and_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress("training", 200, "tokens", done=50) as bar:
        bar.advance(50, "loss 0.4")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "training" in shown
    assert "50%" in shown
    assert "tokens/s" in shown
    assert "loss 0.4" in shown


def test_of_several_processes_only_the_first_shows_its_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimtab.core.progress.SECONDS_BETWEEN_LINES", 0.0)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with Progress("training", 10, "tokens") as bar:
            bar.advance(5)
        assert len(capsys.readouterr().err.splitlines()) == lines
