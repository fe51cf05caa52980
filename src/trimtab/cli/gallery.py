"""`trimtab gallery run|report|prepare`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimtab.core.errors import TrimtabError
from trimtab.gallery import load, slugs
from trimtab.gallery.dictionary_page import DictionaryPage
from trimtab.gallery.report import render
from trimtab.gallery.run import RESULTS, load_results
from trimtab.gallery.run import run as run_experiments

__all__ = ["prepare", "report", "run"]


def run(methods: list[str] = [], *, out: Path, quick: bool = False) -> None:  # noqa: B006 (never changed)
    """Measure methods beside their baselines into OUT/results.json; run again, it goes on where it stopped.

    Args:
        methods: slugs, such as topk-sae; default: every method that has an experiment
        out: directory of the results
        quick: one seed instead of all; the committed result of the full run stands beside it in the report
    """
    results = run_experiments([load(slug) for slug in methods or slugs()], out, quick=quick)
    table = Table("method", "arm", "mean", "95 % interval", "verdict")
    for entry in results["methods"]:
        for arm in entry["arms"]:
            mean = "failed" if arm.get("error") else f"{arm['mean']:.4g}"
            interval = "" if arm["ci_low"] is None else f"{arm['ci_low']:.4g} to {arm['ci_high']:.4g}"
            verdict = entry["verdict"] if arm["role"] == "method" else ""
            table.add_row(entry["method"], f"{arm['name']} ({entry['metric']})", mean, interval, verdict)
    Console().print(table)


def report(directory: Path, *, out: Path | None = None) -> None:
    """Write the page of the results, and of every explained dictionary (latents.json), under DIRECTORY.

    Args:
        directory: what `trimtab gallery run --out`, and `trimtab sae explain` below it, wrote
        out: the page; default: DIRECTORY/report.html
    """
    path = directory / RESULTS
    results = load_results(path) if path.exists() else None
    pages = [DictionaryPage.from_json(p.read_text("utf-8")) for p in sorted(directory.rglob("latents.json"))]
    if results is None and not pages:
        raise TrimtabError(f"directory={str(directory)!r} holds neither {RESULTS} nor a latents.json")
    page = out or directory / "report.html"
    print(render(page, title="Trimtab", results=results, dictionaries=pages, attachments=directory))


def prepare(names: list[str] = [], *, out: Path) -> None:  # noqa: B006 (never changed)
    """Rebuild the micro checkpoints by their recipes, in minutes each.

    Args:
        names: micro-llama, micro-bert; default: all
        out: directory that gets a folder for each
    """
    from trimtab.gallery.testbeds import micro

    for folder in micro.prepare(out, names or None):
        print(folder)
