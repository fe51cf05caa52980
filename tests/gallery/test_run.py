"""Experiments run, stop, go on, fail and are judged; what they write has the documented form."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab.gallery
from trimtab.core.errors import TrimtabError
from trimtab.core.results import Arm, t_interval
from trimtab.gallery import run as run_module
from trimtab.gallery.experiment import Experiment, comparison, standard_verdict
from trimtab.gallery.run import full_result, load_results
from trimtab.gallery.schema import check

run = functools.partial(run_module.run, progress=False)


def _experiment(method: str = "fake-method", **changes: Any) -> Experiment:
    declared: dict[str, Any] = {
        "method": method,
        "claim": "Ours is better.",
        "paper_figure": "0.9 against 0.8",
        "metric": "accuracy",
        "higher_is_better": True,
        "arms": {"ours": ("method", lambda seed: 0.9 + 0.01 * seed), "plain": ("baseline", lambda seed: 0.8)},
        "seeds": (0, 1, 2),
    }
    return Experiment(**declared | changes)


class _Counted:
    """An arm that notes its seeds, and raises for some of them."""

    def __init__(self, values: Callable[[int], Any], errors: dict[int, BaseException] | None = None) -> None:
        self.seeds: list[int] = []
        self._values, self._errors = values, errors or {}

    def __call__(self, seed: int) -> Any:
        self.seeds.append(seed)
        if seed in self._errors:
            raise self._errors[seed]
        return self._values(seed)


def _arms(values: dict[str, Sequence[float]]) -> list[Arm]:
    roles = {"method": "method", "other method": "method"}
    return [
        Arm(name, roles.get(name, "baseline"), numbers, list(range(len(numbers)))) for name, numbers in values.items()
    ]


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("method", "baseline", "higher", "smallest", "expected"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.1], True, 0.0, "shown"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.1], False, 0.0, "not shown"),
        ([1.0, 1.1, 1.1], [2.0, 2.1, 2.2], False, 0.0, "shown"),
        ([1.0, 1.1, 1.1], [2.0, 2.1, 2.2], True, 0.0, "not shown"),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], True, 0.0, "inconclusive"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], True, 0.0, "inconclusive"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.1], True, 5.0, "not shown"),  # certain, and too small to matter
        ([1.01, 1.02, 1.03], [1.0, 1.01, 1.03], True, 0.5, "not shown"),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], True, 0.5, "inconclusive"),
        ([2.0], [1.0], True, 0.0, "inconclusive"),
    ],
)
def test_the_standard_rule(method: list[float], baseline: list[float], higher: bool, smallest: float, expected: str):
    arms = _arms({"baseline": baseline, "method": method})
    assert standard_verdict(arms, higher_is_better=higher, smallest_difference=smallest) == expected


def test_the_first_method_arm_stands_against_the_best_baseline():
    arms = _arms({"low": [1.0, 1.1], "high": [3.0, 3.1], "method": [2.0, 2.1], "other method": [4.0, 4.1]})
    assert standard_verdict(arms, higher_is_better=True) == "not shown"
    assert standard_verdict(arms, higher_is_better=False) == "not shown"
    assert "method 2.05 against 3.05 of high, the best baseline (higher is better)" in comparison(
        arms, higher_is_better=True
    )
    assert "method 2.05 against 1.05 of low, the best baseline (lower is better)" in comparison(
        arms, higher_is_better=False
    )


def test_a_reference_is_not_competed_with():
    arms = _arms({"method": [2.0, 2.1, 2.2], "plain": [1.0, 1.1, 1.1]})
    beside = [*arms, Arm("best of all", "reference", [9.0, 9.1, 9.2], [0, 1, 2])]
    assert standard_verdict(beside, higher_is_better=True) == "shown"
    assert comparison(beside, higher_is_better=True) == comparison(arms, higher_is_better=True)
    assert comparison([arms[0], beside[2]], higher_is_better=True).endswith("Nothing is left to compare.")


def test_the_comparison_states_the_paired_difference_and_its_interval():
    arms = _arms({"method": [2.0, 2.1, 2.5], "plain": [1.0, 1.2, 1.3]})
    low, high = t_interval([1.0, 0.9, 1.2])
    assert comparison(arms, higher_is_better=True) == (
        "method 2.2 against 1.167 of plain, the best baseline (higher is better): difference +1.033, "
        f"95% interval {low:+.4g} to {high:+.4g} over 3 seeds."
    )


# ---------------------------------------------------------------- a run


def test_a_run_writes_what_it_returns_in_the_documented_form(tmp_path: Path):
    found = run([_experiment(), _experiment("second", higher_is_better=False)], tmp_path)
    assert found == load_results(tmp_path / "results.json")
    first, second = found["methods"]
    assert (first["method"], first["verdict"], second["verdict"]) == ("fake-method", "shown", "not shown")
    ours, plain = first["arms"]
    assert (ours["name"], ours["role"], ours["values"]) == ("ours", "method", [0.9, 0.91, 0.92])
    assert ours["mean"] == pytest.approx(0.91)
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx(t_interval([0.9, 0.91, 0.92]))
    assert (plain["ci_low"], plain["ci_high"]) == pytest.approx((0.8, 0.8))
    assert "error" not in ours
    assert first["comparison"].startswith("ours 0.91 against 0.8 of plain")
    assert (first["seeds"], first["quick"], first["full_run"]) == ([0, 1, 2], False, None)
    assert first["versions"]["trimtab"]
    assert first["machine"]["cpu"]
    assert first["seconds"] >= 0
    assert first["attachments"] == []


def test_a_quick_run_uses_one_seed_and_is_inconclusive(tmp_path: Path):
    (entry,) = run([_experiment()], tmp_path, quick=True)["methods"]
    assert (entry["seeds"], entry["quick"], entry["verdict"]) == ([0], True, "inconclusive")
    assert (entry["arms"][0]["ci_low"], entry["arms"][0]["ci_high"]) == (None, None)
    assert entry["comparison"].endswith("from one seed, which gives no interval.")


def test_an_arm_may_return_more_figures(tmp_path: Path):
    arms = {
        "ours": ("method", lambda seed: {"accuracy": np.float32(0.5), "loss": seed, "odd": 1.0} if seed else
                 {"accuracy": 1, "loss": 0.25}),
        "plain": ("baseline", lambda seed: 0),
    }  # fmt: skip
    (entry,) = run([_experiment(arms=arms)], tmp_path)["methods"]
    assert entry["arms"][0]["values"] == [1.0, 0.5, 0.5]
    assert entry["arms"][0]["figures"] == {"loss": [0.25, 1.0, 2.0]}
    assert entry["arms"][1]["figures"] == {}


def test_a_rule_of_the_experiments_own_decides(tmp_path: Path):
    def rule(arms: Sequence[Arm]) -> str:
        return "shown" if min(arms[0].values) > 0.8 else "not shown"

    (entry,) = run([_experiment(rule=rule)], tmp_path, quick=True)["methods"]
    assert entry["verdict"] == "shown"
    with pytest.raises(TrimtabError, match=r"rule of 'fake-method'='maybe' is not known.*inconclusive"):
        run([_experiment(rule=lambda arms: "maybe")], tmp_path)


def test_results_of_other_methods_stay_and_the_same_method_is_replaced_in_its_place(tmp_path: Path):
    run([_experiment("a"), _experiment("b")], tmp_path)
    found = run([_experiment("c"), _experiment("a", claim="Another.")], tmp_path)
    assert [entry["method"] for entry in found["methods"]] == ["a", "b", "c"]
    assert found["methods"][0]["claim"] == "Another."


def test_progress_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_module.run([_experiment()], tmp_path, quick=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fake-method · ours · seed 0: 0.9" in err
    assert "fake-method: inconclusive." in err


# ---------------------------------------------------------------- going on


def test_an_interrupted_run_goes_on_and_measures_nothing_again(tmp_path: Path):
    plain = _Counted(lambda seed: 0.8)
    stopping = _Counted(lambda seed: 0.9, errors={1: KeyboardInterrupt()})
    arms: dict[str, Any] = {"ours": ("method", stopping), "plain": ("baseline", plain)}
    with pytest.raises(KeyboardInterrupt):
        run([_experiment("first"), _experiment(arms=arms)], tmp_path)
    assert [entry["method"] for entry in load_results(tmp_path / "results.json")["methods"]] == ["first"]
    partial = json.loads((tmp_path / "fake-method" / "partial.json").read_text())
    (saved,) = partial["runs"].values()
    assert {name: list(seeds) for name, seeds in saved["values"].items()} == {"ours": ["0"], "plain": ["0"]}

    stopping._errors.clear()
    found = run([_experiment("first"), _experiment(arms=arms)], tmp_path)
    assert (stopping.seeds, plain.seeds) == ([0, 1, 1, 2], [0, 1, 2])
    entry = found["methods"][1]
    assert [arm["values"] for arm in entry["arms"]] == [[0.9] * 3, [0.8] * 3]
    assert entry == run([_experiment(arms=arms)], tmp_path)["methods"][1]
    assert len(plain.seeds) == 3


def test_a_killed_run_goes_on(tmp_path: Path):
    script = f"""
import os, signal, sys
from pathlib import Path
from trimtab.gallery.experiment import Experiment
from trimtab.gallery.run import run

def arm(seed):
    print("measured", seed, flush=True)
    if seed == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return seed

run([Experiment(method="m", claim="c", paper_figure="p", metric="x", higher_is_better=True, seeds=(0, 1, 2),
     arms={{"a": ("method", arm), "b": ("baseline", lambda seed: 0)}})], {str(tmp_path)!r}, progress=False)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(dies_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(dies_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)

    killed = start(1)
    assert (killed.returncode, killed.stdout.split()) == (-signal.SIGKILL, ["measured", "0", "measured", "1"])
    resumed = start(-1)
    assert (resumed.returncode, resumed.stdout.split()) == (0, ["measured", "1", "measured", "2"]), resumed.stderr
    assert load_results(tmp_path / "results.json")["methods"][0]["arms"][0]["values"] == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [{"claim": "Another."}, {"seeds": (0, 1, 2, 3)}, {"metric": "another"}, {"quick": True}, {"package": "9.9"}],
    ids=str,
)
def test_values_of_another_experiment_are_not_mixed_in_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    ours = _Counted(lambda seed: 0.9)
    arms: dict[str, Any] = {"ours": ("method", ours), "plain": ("baseline", lambda seed: 0.8)}
    run([_experiment(arms=arms)], tmp_path)
    changes = dict(changes)
    quick, package = changes.pop("quick", False), changes.pop("package", None)
    if package is not None:
        here = run_module.environment()
        here["versions"]["trimtab"] = package
        monkeypatch.setattr(run_module, "environment", lambda: here)
    changed = _experiment(arms=arms, **changes)
    run([changed], tmp_path, quick=quick)
    assert ours.seeds == [0, 1, 2, *(changed.quick_seeds if quick else changed.seeds)]
    monkeypatch.undo()
    before = len(ours.seeds)
    run([_experiment(arms=arms)], tmp_path)
    assert len(ours.seeds) == before


def test_a_changed_source_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = _Counted(lambda seed: 0.9)
    arms: dict[str, Any] = {"ours": ("method", functools.partial(ours)), "plain": ("baseline", lambda seed: 0.8)}
    run([_experiment(arms=arms)], tmp_path, quick=True)
    monkeypatch.setattr(run_module.inspect, "getsource", lambda module: f"changed {module.__name__}")
    run([_experiment(arms=arms)], tmp_path, quick=True)
    assert ours.seeds == [0, 0]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (ValueError("no such layer \ud800"), "seed 1: ValueError: no such layer"),
        (MemoryError("too big"), "seed 1: MemoryError: too big"),
        (math.nan, "finite numbers are accepted"),
        ("text", "seed 1: ValueError"),
        (None, "seed 1: TypeError"),
        ({"loss": 1.0}, "without the metric 'accuracy'"),
    ],
    ids=repr,
)
def test_a_failing_arm_is_reported_and_the_others_go_on(tmp_path: Path, outcome: Any, error: str):
    failing = _Counted(lambda seed: outcome if seed else 0.9, {1: outcome} if isinstance(outcome, Exception) else None)
    plain = _Counted(lambda seed: 0.8)
    arms: dict[str, Any] = {"ours": ("method", failing), "plain": ("baseline", plain)}
    found = run([_experiment(arms=arms), _experiment("second")], tmp_path)
    first, second = load_results(tmp_path / "results.json")["methods"]
    assert found["methods"][1] == second
    assert second["verdict"] == "shown"
    ours = first["arms"][0]
    assert error in ours["error"]
    assert (ours["values"], ours["seeds"], ours["mean"], ours["ci_low"]) == ([0.9], [0], None, None)
    assert (first["verdict"], plain.seeds) == ("inconclusive", [0, 1, 2])
    assert first["comparison"] == "Failed: ours. Nothing is left to compare."
    assert failing.seeds == [0, 1], "the seeds after a failure are left out"
    partial = json.loads((tmp_path / "fake-method" / "partial.json").read_text())
    (saved,) = partial["runs"].values()
    assert "Traceback" in saved["failures"]["ours"]["traceback"]


def test_a_failed_arm_is_tried_again_and_the_rest_is_kept(tmp_path: Path):
    failing = _Counted(lambda seed: 0.9, errors={1: ValueError("no")})
    plain = _Counted(lambda seed: 0.8)
    arms: dict[str, Any] = {"ours": ("method", failing), "plain": ("baseline", plain)}
    run([_experiment(arms=arms)], tmp_path)
    failing._errors.clear()
    (entry,) = run([_experiment(arms=arms)], tmp_path)["methods"]
    assert (failing.seeds, plain.seeds) == ([0, 1, 1, 2], [0, 1, 2])
    assert (entry["verdict"], "error" in entry["arms"][0]) == ("shown", False)


def test_what_is_left_is_compared_beside_the_failure(tmp_path: Path):
    broken = _Counted(lambda seed: 0.0, errors={0: ValueError("no")})
    arms = _experiment().arms | {"broken": ("baseline", broken)}
    (entry,) = run([_experiment(arms=arms)], tmp_path)["methods"]
    assert entry["verdict"] == "inconclusive"
    assert entry["comparison"].startswith("Failed: broken. ours 0.91 against 0.8 of plain")


# ---------------------------------------------------------------- attachments


def test_attachments_are_written_once_and_named_relative_to_the_results(tmp_path: Path):
    calls = []

    def attach(directory: Path) -> list[Path]:
        calls.append(directory)
        (directory / "figure.svg").write_text("<svg/>")
        return [directory / "figure.svg"]

    for _ in range(2):
        (entry,) = run([_experiment(attachments=attach)], tmp_path)["methods"]
        assert entry["attachments"] == ["fake-method/figure.svg"]
    assert len(calls) == 1
    (tmp_path / "fake-method" / "figure.svg").unlink()
    run([_experiment(attachments=attach)], tmp_path)
    assert len(calls) == 2


def test_attachments_that_fail_or_lie_outside_are_reported(tmp_path: Path):
    def fail(directory: Path) -> list[Path]:
        raise ValueError("no ink")

    def outside(directory: Path) -> list[Path]:
        (tmp_path / "secret").write_text("")
        return [tmp_path / "secret"]

    (entry,) = run([_experiment(attachments=fail)], tmp_path)["methods"]
    assert (entry["attachments"], entry["attachment_error"]) == ([], "ValueError: no ink")
    assert entry["verdict"] == "shown"
    (entry,) = run([_experiment(attachments=outside)], tmp_path)["methods"]
    assert "where attachments go" in entry["attachment_error"]


# ---------------------------------------------------------------- the committed full run


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a committed full run of `_experiment()`."""
    directory = tmp_path / "committed"
    directory.mkdir()
    monkeypatch.setattr(run_module, "FULL_RESULTS", directory)
    (entry,) = run([_experiment()], tmp_path / "full")["methods"]
    (directory / "fake-method.json").write_text(json.dumps(entry))
    return directory / "fake-method.json"


def test_a_quick_run_has_the_committed_full_run_beside_it(tmp_path: Path, committed: Path):
    (entry,) = run([_experiment()], tmp_path / "quick", quick=True)["methods"]
    assert entry["full_run"] == json.loads(committed.read_text())
    assert entry["full_run"]["verdict"] == "shown"
    assert load_results(tmp_path / "quick" / "results.json")["methods"] == [entry]
    (entry,) = run([_experiment()], tmp_path / "again")["methods"]
    assert entry["full_run"] is None


def test_a_committed_run_of_another_claim_is_not_shown(tmp_path: Path, committed: Path):
    with pytest.warns(UserWarning, match=r"fake-method\.json is of another experiment \(claim differs\)"):
        assert full_result(_experiment(claim="Another.")) is None


def test_a_damaged_committed_run_is_an_error(committed: Path):
    entry = json.loads(committed.read_text())
    committed.write_text(json.dumps(entry | {"quick": True}))
    with pytest.raises(TrimtabError, match=r"fake-method\.json has quick=true"):
        full_result(_experiment())
    committed.write_text(json.dumps(entry | {"arms": []}))
    with pytest.raises(TrimtabError, match=r"fake-method\.json\.arms is \[\]"):
        full_result(_experiment())
    committed.write_text("{")
    with pytest.raises(TrimtabError, match="not valid JSON"):
        full_result(_experiment())


# ---------------------------------------------------------------- experiments by name


def test_experiments_are_found_by_slug_and_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trimtab.gallery, "_MODULES", {"fake-method": "fake", "absent": "absent"})
    module = types.ModuleType("trimtab.gallery.experiments.fake")
    module.EXPERIMENT = _experiment()
    monkeypatch.setitem(sys.modules, "trimtab.gallery.experiments", types.ModuleType("trimtab.gallery.experiments"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert trimtab.gallery.slugs() == ["fake-method", "absent"]
    assert trimtab.gallery.load("fake-method") is module.EXPERIMENT
    with pytest.raises(TrimtabError, match=r"method='fake-methods' is not known. Did you mean fake-method\?"):
        trimtab.gallery.load("fake-methods")


def test_each_listed_experiment_loads_under_its_slug():
    assert [trimtab.gallery.load(slug).method for slug in trimtab.gallery.slugs()] == trimtab.gallery.slugs()


def test_each_committed_full_run_is_of_its_experiment():
    names = sorted(path.stem for path in run_module.FULL_RESULTS.glob("*.json"))
    assert [full_result(trimtab.gallery.load(name))["method"] for name in names] == names


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "../up"}, r"method='\.\./up': a slug"),
        ({"claim": " "}, "claim of experiment 'fake-method' is empty"),
        ({"arms": {"ours": ("method", float)}}, r"have the roles \['method'\]"),
        ({"arms": {"ours": ("methods", float)}}, r"role of an arm of 'fake-method'='methods'.*Did you mean method\?"),
        ({"seeds": ()}, r"seeds=\(\) of 'fake-method'"),
        ({"quick_seeds": (1, 1)}, r"quick_seeds=\(1, 1\)"),
        ({"smallest_difference": -1.0}, r"smallest_difference=-1\.0"),
        ({"smallest_difference": math.nan}, "smallest_difference=nan"),
    ],
)
def test_a_bad_declaration_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(TrimtabError, match=message):
        _experiment(**changes)


def test_a_method_that_is_there_twice_is_refused(tmp_path: Path):
    with pytest.raises(TrimtabError, match="each once is accepted"):
        run([_experiment(), _experiment()], tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 2, "runs": {}}', '{"format_version": 1, "runs": 3}'])
def test_a_damaged_partial_file_is_an_error_and_stays(tmp_path: Path, text: str):
    path = tmp_path / "fake-method" / "partial.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(TrimtabError, match=r"partial\.json of an earlier run cannot be continued.*remove it"):
        run([_experiment()], tmp_path)
    assert path.read_text() == text


def test_damaged_results_stop_a_run_before_it_measures(tmp_path: Path):
    (tmp_path / "results.json").write_text("{")
    ours = _Counted(lambda seed: 0.9)
    with pytest.raises(TrimtabError, match=r"results\.json' is not valid JSON"):
        run([_experiment(arms={"a": ("method", ours), "b": ("baseline", ours)})], tmp_path)
    assert ours.seeds == []


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """A change of nested results: `_set("methods.0.claim", 3)`; the value `...` deletes the key."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(results: Any) -> None:
        for parent in parents:
            results = results[parent]
        if value is ...:
            del results[last]
        else:
            results[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "format_version=2 is of a newer Trimtab"),
        ("format_version", 0, "format_version is 0; accepted: 1"),
        ("methods", {}, r"methods is \{\}; accepted: a list of objects"),
        ("methods.0.claim", ..., r"methods\[0\]\.claim is missing; accepted: a text"),
        ("methods.0.claim", 3, r"methods\[0\]\.claim is 3; accepted: a text"),
        ("methods.0.verdict", "yes", r"methods\[0\]\.verdict is 'yes'; accepted: shown or not shown"),
        ("methods.0.date", "today", r"date is 'today'; accepted: a date like"),
        ("methods.0.seconds", -1, r"seconds is -1; accepted"),
        ("methods.0.machine", {"cpu": []}, r"machine is \{'cpu': \[\]\}; accepted"),
        ("methods.0.arms.1.role", "x", r"methods\[0\]\.arms\[1\]\.role is 'x'; accepted: method or baseline"),
        ("methods.0.arms.1.values", [1, None, 2], r"arms\[1\]\.values is \[1, None, 2\]; accepted: a list of finite"),
        ("methods.0.arms.1.values", [1], r"arms\[1\]\.values must have a number for each of its seeds"),
        ("methods.0.arms.1.mean", math.nan, r"arms\[1\]\.mean is nan; accepted: a finite number or null"),
        ("methods.0.arms.1", [], r"arms\[1\] is \[\]; accepted: an object"),
        ("methods.0.full_run", {}, r"methods\[0\]\.full_run\.method is missing"),
        ("methods.0.attachments", ["../../etc/passwd"], r"attachments is .*; accepted: a list of relative paths"),
        ("methods.0.attachments", ["/etc/passwd"], r"attachments is .*; accepted: a list of relative paths"),
    ],
)
def test_results_of_another_form_are_refused_by_place(tmp_path: Path, path: str, value: Any, message: str):
    results = run([_experiment()], tmp_path)
    _set(path, value)(results)
    with pytest.raises(TrimtabError, match=message):
        check(results)


def test_results_that_nest_or_repeat_are_refused(tmp_path: Path):
    results = run([_experiment()], tmp_path)
    entry = results["methods"][0]
    with pytest.raises(TrimtabError, match=r"methods are \['fake-method', 'fake-method'\]; accepted: each once"):
        check(results | {"methods": [entry, entry]})
    nested = entry | {"full_run": entry | {"full_run": entry}}
    with pytest.raises(TrimtabError, match=r"full_run\.full_run is .*; accepted: null"):
        check(results | {"methods": [nested]})


def test_a_results_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(TrimtabError, match=r"results\.json' cannot be read"):
        load_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(TrimtabError, match=r"results\.json: results are \[\]; accepted: an object"):
        load_results(tmp_path / "results.json")
