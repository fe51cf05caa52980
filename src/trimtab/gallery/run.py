"""Running experiments: each arm with each seed, saved as it completes, so that a run that is stopped continues.

    DIR/results.json          what came out (its form: `trimtab.gallery.schema`)
    DIR/<slug>/partial.json   the values measured so far, kept apart by the fingerprint of what measured them

The fingerprint covers what the experiment declares (claim, metric, arms, seeds, quick or not), the source of
the modules that measure, the versions of the packages and the machine. Values of another one are neither used
nor thrown away.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import trimtab
from trimtab.core.errors import TrimtabError
from trimtab.core.files import write_file
from trimtab.core.results import Arm, environment
from trimtab.gallery.experiment import Experiment, comparison, verdict
from trimtab.gallery.schema import FORMAT_VERSION, check_entry, load_results

__all__ = ["RESULTS", "full_result", "load_results", "run"]

RESULTS = "results.json"
PARTIAL = "partial.json"
# The entries of full runs, as results.json had them, one file a method: part of the package.
FULL_RESULTS = Path(__file__).parent / "full_results"


def run(
    experiments: Sequence[Experiment], out_dir: str | Path, *, quick: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Measure `experiments` into `out_dir`, write its results.json after each of them, and return its content.

    Entries that results.json has of other methods stay. Values that an earlier run with the same fingerprint
    saved are used again. An arm that raises, or whose metric is not a finite number, is reported with its
    error, its seeds that follow are left out, and the other arms and experiments go on; running again tries
    it again. After KeyboardInterrupt what was measured is saved; running again goes on from there.

    Args:
        quick: use the experiments' `quick_seeds`, and put the committed full run beside.
        progress: show it on standard error.

    Raises:
        TrimtabError: if two experiments are of one method, or a file of an earlier run is damaged.
    """
    out_dir = Path(out_dir)
    methods = [experiment.method for experiment in experiments]
    if len(set(methods)) != len(methods):
        raise TrimtabError(f"experiments are of the methods {methods}: each once is accepted.")
    path = out_dir / RESULTS
    earlier = load_results(path)["methods"] if path.exists() else []
    entries = {entry["method"]: entry for entry in earlier}
    full_runs = {each.method: full_result(each) if quick else None for each in experiments}
    console = Console(stderr=True, quiet=not progress)
    results: dict[str, Any] = {"format_version": FORMAT_VERSION, "methods": list(entries.values())}
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        for experiment in experiments:
            entry = _measured(experiment, out_dir / experiment.method, quick, bar)
            entries[experiment.method] = entry | {"full_run": full_runs[experiment.method]}
            results["methods"] = list(entries.values())
            write_file(path, _json(results))
            bar.console.print(
                f"{experiment.method}: {entry['verdict']}. {entry['comparison']}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    return results


def full_result(experiment: Experiment) -> dict[str, Any] | None:
    """The committed entry of the experiment's full run; None if there is none, or one of another claim (warns)."""
    path = FULL_RESULTS / f"{experiment.method}.json"
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrimtabError(f"{path} is not valid JSON: {error}.") from error
    check_entry(entry, path.name)
    if entry["quick"]:
        raise TrimtabError(f"{path.name} has quick=true; accepted: the entry of a full run.")
    for key in ("method", "claim", "metric", "higher_is_better"):
        if entry[key] != getattr(experiment, key):
            warnings.warn(f"{path.name} is of another experiment ({key} differs): not shown", stacklevel=2)
            return None
    return entry


def _measured(experiment: Experiment, directory: Path, quick: bool, bar: Progress) -> dict[str, Any]:
    """The entry of one experiment, but for its full run."""
    seeds = experiment.quick_seeds if quick else experiment.seeds
    here = environment()
    ledger = _Ledger(directory / PARTIAL, _fingerprint(experiment, quick, here))
    task = bar.add_task(experiment.method, total=len(seeds) * len(experiment.arms))
    for seed in seeds:
        for name, (_, measure) in experiment.arms.items():
            if name not in ledger.failures and ledger.value(name, seed) is None:
                bar.update(task, description=f"{experiment.method} · {name} · seed {seed}")
                _measure(experiment.metric, measure, name, seed, ledger)
                bar.console.print(
                    f"{experiment.method} · {name} · {ledger.line(name, seed)}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            bar.advance(task)
    arms = [_arm(name, role, seeds, ledger) for name, (role, _) in experiment.arms.items()]
    entry = {
        "method": experiment.method,
        "claim": experiment.claim,
        "paper_figure": experiment.paper_figure,
        "metric": experiment.metric,
        "higher_is_better": experiment.higher_is_better,
        "arms": [arm.to_json() | {"figures": ledger.figures(arm)} for arm in arms],
        "verdict": verdict(experiment, arms),
        "comparison": comparison(arms, higher_is_better=experiment.higher_is_better),
        "seconds": round(ledger.seconds(), 3),
        "seeds": list(seeds),
        **here,
        "quick": quick,
    }
    return entry | _attached(experiment, directory, ledger)


def _measure(
    metric: str, measure: Callable[[int], float | Mapping[str, float]], name: str, seed: int, ledger: _Ledger
) -> None:
    """Run one arm with one seed and save what came out, be it an error."""
    start = time.perf_counter()
    try:
        found = measure(seed)
        figures = found if isinstance(found, Mapping) else {metric: found}
        if metric not in figures:
            raise TrimtabError(f"the arm returned the figures {list(figures)}, without the metric {metric!r}.")
        numbers = {key: float(figure) for key, figure in figures.items()}
        if not all(map(math.isfinite, numbers.values())):
            raise TrimtabError(f"the arm returned {numbers}: finite numbers are accepted.")
    except Exception as error:  # whatever an arm raises is its result, and is reported
        ledger.fail(name, f"seed {seed}: {type(error).__name__}: {error}", traceback.format_exc())
    else:
        ledger.add(name, seed, numbers.pop(metric), numbers, time.perf_counter() - start)


def _arm(name: str, role: str, seeds: Sequence[int], ledger: _Ledger) -> Arm:
    measured = {seed: value for seed in seeds if (value := ledger.value(name, seed)) is not None}
    return Arm(name, role, list(measured.values()), list(measured), ledger.failures.get(name))


def _attached(experiment: Experiment, directory: Path, ledger: _Ledger) -> dict[str, Any]:
    """The entry's attachments: written once, and again if a file is missing."""
    if experiment.attachments is None:
        return {"attachments": []}
    root = directory.parent
    kept = ledger.attachments
    if kept is None or not all((root / name).is_file() for name in kept):
        try:
            paths = [Path(path).resolve() for path in experiment.attachments(directory)]
            for path in paths:
                if not path.is_file() or not path.is_relative_to(directory.resolve()):
                    raise TrimtabError(f"{path} is no file in {directory}, where attachments go.")
            kept = [path.relative_to(root.resolve()).as_posix() for path in paths]
        except Exception as error:  # as with an arm: reported, and the others go on
            ledger.fail("attachments", str(error), traceback.format_exc())
            return {"attachments": [], "attachment_error": f"{type(error).__name__}: {error}"}
        ledger.attach(kept)
    return {"attachments": kept}


class _Ledger:
    """The values of one run in `path`, saved at each change; those of other fingerprints stay beside them."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._runs = _read_partial(path)
        self._run = self._runs.setdefault(fingerprint, {"values": {}, "attachments": None})
        self._run["failures"] = {}  # what failed is tried again
        self.failures: dict[str, str] = {}

    def value(self, name: str, seed: int) -> float | None:
        record = self._run["values"].get(name, {}).get(str(seed))
        return None if record is None else record["value"]

    def add(self, name: str, seed: int, value: float, figures: Mapping[str, float], seconds: float) -> None:
        record = {"value": value, "figures": dict(figures), "seconds": seconds}
        self._run["values"].setdefault(name, {})[str(seed)] = record
        self._save()

    def fail(self, name: str, error: str, trace: str) -> None:
        self.failures[name] = error
        self._run["failures"][name] = {"error": error, "traceback": trace}
        self._save()

    def attach(self, names: list[str]) -> None:
        self._run["attachments"] = names
        self._save()

    @property
    def attachments(self) -> list[str] | None:
        return self._run["attachments"]

    def line(self, name: str, seed: int) -> str:
        """What came out of an arm with a seed, for people."""
        if name in self.failures:
            return f"FAILED: {self.failures[name]} (traceback in {self._path})"
        record = self._run["values"][name][str(seed)]
        return f"seed {seed}: {record['value']:.4g} ({record['seconds']:.1f} s)"

    def figures(self, arm: Arm) -> dict[str, list[float]]:
        """The figures beside the metric that all seeds of the arm have."""
        records = [self._run["values"][arm.name][str(seed)]["figures"] for seed in arm.seeds]
        shared = [key for key in records[0] if all(key in record for record in records)] if records else []
        return {key: [record[key] for record in records] for key in shared}

    def seconds(self) -> float:
        return sum(record["seconds"] for seeds in self._run["values"].values() for record in seeds.values())

    def _save(self) -> None:
        write_file(self._path, _json({"format_version": FORMAT_VERSION, "runs": self._runs}))


def _read_partial(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        partial = json.loads(path.read_text(encoding="utf-8"))
        if partial["format_version"] == FORMAT_VERSION and isinstance(partial["runs"], dict):
            return partial["runs"]
        reason = f"format_version={partial['format_version']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = repr(error)
    raise TrimtabError(f"{path} of an earlier run cannot be continued ({reason}): remove it to measure anew.")


def _fingerprint(experiment: Experiment, quick: bool, here: Mapping[str, Any]) -> str:
    declared = {
        "claim": experiment.claim,
        "metric": experiment.metric,
        "arms": [[name, role, _source(measure)] for name, (role, measure) in experiment.arms.items()],
        "seeds": list(experiment.quick_seeds if quick else experiment.seeds),
        "quick": quick,
        "package": _package_digest(),
        "versions": here["versions"],
        "machine": {key: here["machine"][key] for key in ("system", "cpu", "gpu")},
    }
    return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()


@functools.cache
def _package_digest() -> str:
    """A checksum of Trimtab's own sources: what they measured before a change is not what they measure after it."""
    digest = hashlib.sha256()
    for path in sorted(Path(trimtab.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source(function: Callable[..., Any]) -> str:
    """The source of the module of `function`, so that a changed experiment is measured anew; "" if unknown."""
    while isinstance(function, functools.partial):
        function = function.func
    module = inspect.getmodule(function)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _json(value: Any) -> bytes:
    # An error's text may hold lone surrogates, which UTF-8 does not have; as escapes they are valid JSON.
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
