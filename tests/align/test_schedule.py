"""When a reference moves."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest

from trimtab.align import TrustRegionReference, UpdateSchedule
from trimtab.core.errors import TrimtabError


def moves(schedule: UpdateSchedule, total: int = 12) -> list[int]:
    return [step for step in range(1, total + 1) if schedule.policy_weight(step, total)]


def test_the_presets_are_the_two_variants_and_their_mixture() -> None:
    assert TrustRegionReference.soft(0.3).schedule == UpdateSchedule(alpha=0.3, tau=1)
    assert TrustRegionReference.hard(4).schedule == UpdateSchedule(alpha=1.0, tau=4)
    assert TrustRegionReference.mixed(0.3, 4).schedule == UpdateSchedule(alpha=0.3, tau=4)
    assert TrustRegionReference.every(0.25).schedule == UpdateSchedule(alpha=1.0, tau=None, fraction=0.25)


def test_the_first_update_comes_after_step_tau() -> None:
    assert moves(UpdateSchedule(alpha=1, tau=5)) == [5, 10]
    assert moves(UpdateSchedule(alpha=0.5, tau=1), 3) == [1, 2, 3]
    assert UpdateSchedule(alpha=0.5, tau=2).policy_weight(2, 4) == 0.5


@pytest.mark.parametrize(("fraction", "total", "tau"), [(0.25, 12, 3), (1.0, 12, 12), (0.01, 12, 1), (0.1, 512, 51)])
def test_a_fraction_is_a_share_of_the_run(fraction: float, total: int, tau: int) -> None:
    schedule = UpdateSchedule(alpha=1, tau=None, fraction=fraction)
    assert schedule.interval(total) == tau
    assert schedule.updates(total) == len(moves(schedule, total))


@pytest.mark.parametrize("tau", [1, 3, 5, 13])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, None), (4, 9), (0, 6)])
def test_updates_are_counted_within_start_and_stop(tau: int, start: int, stop: int | None) -> None:
    schedule = UpdateSchedule(alpha=1, tau=tau, start_step=start, stop_step=stop)
    found = moves(schedule)
    assert all(start < step <= (stop or 12) for step in found)
    assert schedule.updates(12) == len(found)


def test_a_threshold_holds_updates_back() -> None:
    schedule = UpdateSchedule(alpha=1, tau=2, margin_threshold=1.5)
    assert not schedule.policy_weight(2, 10, margin=1.4)
    assert not schedule.policy_weight(2, 10, margin=math.nan)
    assert schedule.policy_weight(2, 10, margin=1.5) == 1
    assert not schedule.policy_weight(3, 10, margin=9.0)


def test_tau_and_alpha_change_in_a_straight_line() -> None:
    longer = UpdateSchedule(alpha=1, tau=2, final_tau=6)
    assert moves(longer, 20) == [2, 4, 7, 10, 14, 19]  # 2.0, 2.4, 2.8, 3.4, 4.0, 4.8, rounded; then 5.8
    assert longer.interval(20) == 2
    shorter = UpdateSchedule(alpha=1, tau=6, final_tau=2)
    assert moves(shorter, 20) == [6, 11, 15, 18, 20]
    assert (longer.updates(20), shorter.updates(20)) == (6, 5)
    weights = UpdateSchedule(alpha=0.25, tau=5, final_alpha=1)
    assert [weights.policy_weight(step, 20) for step in (5, 10, 15, 20)] == [0.4375, 0.625, 0.8125, 1.0]
    assert weights.policy_weight(6, 20) == 0
    part = UpdateSchedule(alpha=1, tau=None, fraction=0.1, final_tau=6, start_step=3, stop_step=14)
    assert moves(part, 20) == [4, 7, 10, 14]  # the line is that of the whole run


def test_a_line_between_equals_is_none() -> None:
    for total in (12, 100):
        flat = UpdateSchedule(alpha=0.3, tau=3, final_alpha=0.3, final_tau=3)
        assert moves(flat, total) == moves(UpdateSchedule(alpha=0.3, tau=3), total)
        assert flat.policy_weight(9, total) == 0.3


def test_whether_a_schedule_ever_moves_or_averages() -> None:
    for options, moves_ever, averages in (
        ({"alpha": 1}, True, False),
        ({"alpha": 0.5}, True, True),
        ({"alpha": 1, "final_alpha": 1}, True, False),
        ({"alpha": 1, "final_alpha": 0.5}, True, True),
        ({"alpha": 0, "final_alpha": 1}, True, True),
    ):
        schedule = UpdateSchedule(**options)
        assert (schedule.moves, schedule.averages) == (moves_ever, averages)


def test_alpha_zero_warns_and_never_moves() -> None:
    with pytest.warns(UserWarning, match="never moves"):
        schedule = UpdateSchedule(alpha=0, tau=1)
    assert moves(schedule) == []
    assert schedule.updates(12) == 0


def test_others_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrustRegionReference.soft(), TrustRegionReference.hard(), TrustRegionReference.mixed()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"tau": 0}, "tau=0"),
        ({"tau": -2}, "tau=-2"),
        ({"tau": 2.5}, "tau=2.5"),
        ({"tau": math.nan}, "tau=nan"),
        ({"tau": math.inf}, "tau=inf"),
        ({"tau": True}, "tau=True"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"tau": None}, "tau=None and fraction=None"),
        ({"tau": 3, "fraction": 0.5}, "tau=3 and fraction=0.5"),
        ({"tau": None, "fraction": 0.0}, "fraction=0.0"),
        ({"tau": None, "fraction": 1.1}, "fraction=1.1"),
        ({"start_step": -1}, "start_step=-1"),
        ({"start_step": 5, "stop_step": 5}, "stop_step=5"),
        ({"final_alpha": 1.5}, "final_alpha=1.5"),
        ({"final_alpha": math.nan}, "final_alpha=nan"),
        ({"final_tau": 0}, "final_tau=0"),
        ({"final_tau": 2.5}, "final_tau=2.5"),
        ({"margin_threshold": math.nan}, "margin_threshold=nan"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(TrimtabError, match=named):
        UpdateSchedule(**options)


def test_an_unknown_average_of_factors_is_refused() -> None:
    with pytest.raises(TrimtabError, match="lora"):
        TrustRegionReference(UpdateSchedule(), lora="exactly")
