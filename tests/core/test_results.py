"""Means, intervals and paired differences against closed forms and scipy; what is shown of them; bad input."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from io import StringIO

import numpy as np
import pytest
import scipy.stats

from trimtab.core.errors import TrimtabError
from trimtab.core.results import (
    Arm,
    bootstrap_interval,
    environment,
    figure_svg,
    markdown_table,
    paired_difference,
    t_interval,
)

METHOD = Arm("method", "method", [0.5, 0.75, 1.0], [0, 1, 2])
BASELINE = Arm("base|line", "baseline", [0.7, 0.25, 0.3], [2, 0, 1])
FAILED = Arm("broken", "baseline", [0.5], [0], error="seed 1: ValueError: no")

# ---------------------------------------------------------------- formulas


def test_two_values_have_the_interval_of_a_cauchy_distribution():
    # One degree of freedom: the quantile is tan(π c / 2), and s / √2 is half the distance of the two values.
    low, high = t_interval([1.0, 4.0], confidence=0.5)
    half = 1.5 * math.tan(math.pi * 0.5 / 2)
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_the_t_interval_is_scipys(confidence: float):
    values = np.random.default_rng(0).normal(3, 2, 7)
    expected = scipy.stats.t.interval(confidence, 6, values.mean(), scipy.stats.sem(values))
    assert t_interval(values.tolist(), confidence) == pytest.approx(expected, rel=1e-12)


def test_equal_values_have_an_interval_of_no_width():
    assert t_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def test_one_value_has_no_interval():
    assert t_interval([1.0]) is None
    assert bootstrap_interval([1.0]) is None
    assert Arm("a", "method", [1.0], [0]).interval is None


def test_the_bootstrap_of_two_values_is_the_exact_one():
    # The four resamples of (0, 1) are equally likely: means 0 (1/4), 1/2 (1/2), 1 (1/4).
    assert bootstrap_interval([0, 1], confidence=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)


def test_the_bootstrap_agrees_with_scipys_and_repeats():
    values = np.random.default_rng(0).normal(3, 2, 40)
    low, high = bootstrap_interval(values.tolist(), n_resamples=20_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert (low, high) == bootstrap_interval(values.tolist(), n_resamples=20_000)
    assert (low, high) != bootstrap_interval(values.tolist(), n_resamples=20_000, seed=1)


def test_differences_are_paired_by_seed():
    found = paired_difference(METHOD, BASELINE)
    differences = [0.5 - 0.25, 0.75 - 0.3, 1.0 - 0.7]
    assert found.n_seeds == 3
    assert found.mean == pytest.approx(sum(differences) / 3, rel=1e-12)
    assert found.interval == pytest.approx(t_interval(differences), rel=1e-12)


def test_a_common_effect_of_the_seed_cancels():
    noise = [10.0, -20.0, 30.0]
    first = Arm("a", "method", [value + 1 for value in noise], [0, 1, 2])
    found = paired_difference(first, Arm("b", "baseline", noise, [0, 1, 2]))
    assert (found.mean, found.interval) == (1.0, (1.0, 1.0))


def test_the_difference_of_one_seed_has_no_interval():
    found = paired_difference(Arm("a", "method", [2], [5]), Arm("b", "baseline", [1], [5]))
    assert (found.mean, found.interval, found.n_seeds) == (1.0, None, 1)


# ---------------------------------------------------------------- JSON, tables, figures


@pytest.mark.parametrize(
    "arm", [METHOD, BASELINE, FAILED, Arm("one", "method", [1 / 3], [7])], ids=lambda arm: arm.name
)
def test_an_arm_returns_from_json(arm: Arm):
    assert Arm.from_json(json.loads(json.dumps(arm.to_json(), allow_nan=False))) == arm


def test_the_json_of_an_arm_has_mean_and_interval():
    low, high = t_interval([0.5, 0.75, 1.0])
    assert METHOD.to_json() == {
        "name": "method",
        "role": "method",
        "values": [0.5, 0.75, 1.0],
        "seeds": [0, 1, 2],
        "mean": 0.75,
        "ci_low": low,
        "ci_high": high,
    }
    failed = FAILED.to_json()
    assert (failed["mean"], failed["ci_low"], failed["ci_high"]) == (None, None, None)
    assert failed["error"] == "seed 1: ValueError: no"


def test_the_environment_says_what_a_figure_was_measured_with():
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"trimtab", "torch", "transformers"} <= set(found["versions"])
    assert {"system", "cpu", "cores", "threads", "memory_gib", "gpu"} == set(found["machine"])
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1
    assert len(found["date"]) == 10


def test_the_table_has_a_row_for_each_arm():
    table = markdown_table([METHOD, BASELINE, FAILED], metric="accuracy", higher_is_better=True)
    lines = table.splitlines()
    assert lines[0] == "| arm | role | accuracy (higher is better) | 95% t interval | by seed |"
    assert lines[2] == "| method | method | 0.75 | 0.129 to 1.371 | 0.5, 0.75, 1 |"
    assert lines[3].startswith(r"| base\|line | baseline | 0.4167 |")
    assert lines[4] == "| broken | baseline | – | – | 0.5; failed: seed 1: ValueError: no |"
    assert lines[-1] == "Seeds: 0, 1, 2."


def test_rich_shows_the_table():
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(file=StringIO(), width=120)
    console.print(Markdown(markdown_table([METHOD, BASELINE], metric="loss", higher_is_better=False)))
    text = console.file.getvalue()
    assert "base|line" in text
    assert "loss (lower is better)" in text


def test_the_figure_is_svg_that_repeats_and_shows_every_arm():
    arms = [METHOD, BASELINE, FAILED, Arm("<$5$ & more", "baseline", [0.6], [0])]
    text = figure_svg(arms, metric="a_b $x$", higher_is_better=False)
    assert text == figure_svg(arms, metric="a_b $x$", higher_is_better=False)
    shown = {element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"method", "base|line", "broken", "failed", "<$5$ & more", "a_b $x$ (lower is better)"} <= shown


def test_a_figure_needs_no_display_and_leaves_no_figure_open():
    figure_svg([METHOD], metric="m", higher_is_better=True)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# ---------------------------------------------------------------- bad input


def test_a_bad_arm_is_refused():
    with pytest.raises(TrimtabError, match=r"role='methods' is not known\. Did you mean method\?"):
        Arm.from_json(METHOD.to_json() | {"role": "methods"})
    with pytest.raises(TrimtabError, match=r"'a' has 2 values for seeds=\[0\]"):
        Arm("a", "method", [1, 2], [0])
    with pytest.raises(TrimtabError, match="each seed once"):
        Arm("a", "method", [1, 2], [0, 0])
    with pytest.raises(TrimtabError, match="finite numbers are accepted"):
        Arm("a", "method", [1, math.nan], [0, 1])
    with pytest.raises(TrimtabError, match="no values and no error"):
        Arm("a", "method", [], [])
    with pytest.raises(TrimtabError, match="lacks the key 'values'"):
        Arm.from_json({"name": "a", "role": "method"})


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(TrimtabError, match=r"seeds \[0, 1, 2\] and \[5\]: pairing needs the same ones"):
        paired_difference(METHOD, Arm("b", "baseline", [1], [5]))
    with pytest.raises(TrimtabError, match="'broken' failed and cannot be compared"):
        paired_difference(METHOD, FAILED)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, -0.5, math.nan])
def test_a_confidence_outside_its_range_is_refused(confidence: float):
    for interval in (t_interval, bootstrap_interval):
        with pytest.raises(TrimtabError, match="between 0 and 1"):
            interval([1.0, 2.0], confidence)
    with pytest.raises(TrimtabError, match="n_resamples=0"):
        bootstrap_interval([1.0, 2.0], n_resamples=0)
