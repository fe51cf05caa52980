"""Schedules: exact values, ends, monotony, use in a torch scheduler, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import TrimtabError
from trimtab.core.schedules import linear_decay, warmup_constant, warmup_cosine, warmup_hold_decay


def test_linear_decay_is_the_trust_region_budget() -> None:
    assert [linear_decay(k, 4) for k in range(7)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert [linear_decay(k, 0) for k in range(3)] == [0.0, 0.0, 0.0]
    assert [0.02 * linear_decay(k, 50) for k in (0, 25, 50)] == [0.02, 0.01, 0.0]


def test_warmup_constant() -> None:
    assert [warmup_constant(k, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_constant(k, 0) for k in range(2)] == [1.0, 1.0]


def test_warmup_cosine_values() -> None:
    values = [warmup_cosine(k, 10, 0.2, 0.1) for k in range(12)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(1, 9)]
    assert values == pytest.approx([0.5, 1.0, *cosine, 0.1, 0.1])
    assert values[9] == 0.1


def test_warmup_cosine_of_the_kron_recipe() -> None:
    peak, floor = 8e-4, 1e-6
    rates = [peak * warmup_cosine(k, 1000, 0.1, floor / peak) for k in range(1000)]
    assert rates[0] == pytest.approx(peak / 100)
    assert rates[99] == peak == max(rates)
    assert rates[549] == pytest.approx((peak + floor) / 2)
    assert rates[-1] == pytest.approx(floor, rel=1e-12)


def test_warmup_cosine_without_and_with_nothing_but_warmup() -> None:
    assert warmup_cosine(0, 4, 0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert warmup_cosine(3, 4, 0) == 0.0
    assert [warmup_cosine(k, 4, 1) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmup_cosine(0, 1, 0.1, 0.25) == 0.25


def test_warmup_hold_decay_values() -> None:
    values = [warmup_hold_decay(k, 10, 0.2, 0.4) for k in range(12)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0])
    plain = [warmup_hold_decay(k, 10, 0.2, 0.8) for k in range(10)]
    assert plain == pytest.approx([0.5, 1, *[1 - i / 8 for i in range(1, 9)]])
    assert [warmup_hold_decay(k, 4, 0.5, 0) for k in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert warmup_hold_decay(5, 10, 0.7, 0.3) == pytest.approx(6 / 7)


@given(
    total=st.integers(1, 400),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_shapes(total: int, warmup: float, floor: float, decay: float) -> None:
    cosine = [warmup_cosine(k, total, warmup, floor) for k in range(total + 2)]
    assert all(0 < value <= 1 for value in cosine[: total - 1])
    peak = cosine.index(max(cosine))
    assert cosine[: peak + 1] == sorted(cosine[: peak + 1])
    assert cosine[peak:] == sorted(cosine[peak:], reverse=True)
    assert cosine[total - 1] == cosine[total] == cosine[total + 1]
    assert cosine[total - 1] == pytest.approx(1.0 if warmup == 1 else floor)
    held = [warmup_hold_decay(k, total, warmup, decay * (1 - warmup)) for k in range(total)]
    assert all(0 < value <= 1 for value in held[: total - 1])
    peak = held.index(max(held))
    assert held[: peak + 1] == sorted(held[: peak + 1])
    assert held[peak:] == sorted(held[peak:], reverse=True)


def test_as_a_torch_scheduler() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warmup_cosine(k, 5, 0.4))
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 * warmup_cosine(k, 5, 0.4) for k in range(5)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_decay(-1, 5), "step=-1"),
        (lambda: linear_decay(0, -5), "total=-5"),
        (lambda: warmup_constant(-1, 5), "step=-1"),
        (lambda: warmup_constant(0, -2), "warmup_steps=-2"),
        (lambda: warmup_cosine(-1, 5), "step=-1"),
        (lambda: warmup_cosine(0, 0), "total=0"),
        (lambda: warmup_cosine(0, 5, 1.1), "warmup_fraction=1.1"),
        (lambda: warmup_cosine(0, 5, -0.1), "warmup_fraction=-0.1"),
        (lambda: warmup_cosine(0, 5, 0.1, 2), "floor=2"),
        (lambda: warmup_cosine(0, 5, math.nan), "warmup_fraction=nan"),
        (lambda: warmup_hold_decay(-1, 5, 0.1, 0.2), "step=-1"),
        (lambda: warmup_hold_decay(0, 0, 0.1, 0.2), "total=0"),
        (lambda: warmup_hold_decay(0, 5, 2, 0.2), "warmup_fraction=2"),
        (lambda: warmup_hold_decay(0, 5, 0.1, -1), "decay_fraction=-1"),
        (lambda: warmup_hold_decay(0, 5, 0.6, 0.6), "warmup_fraction=0.6 and decay_fraction=0.6"),
    ],
)
def test_bad_input_is_named(call: Callable[[], float], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        call()
