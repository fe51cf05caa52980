"""`python -m benchmarks [names]`: run the scripts, each in a process of its own, and say what falls short."""

from __future__ import annotations

import argparse
import subprocess
import sys

from rich.console import Console

from benchmarks.measure import read_rows
from benchmarks.peers import ROOT

__all__ = ["main", "shortfalls"]

SCRIPTS = (
    "startup",
    "trust_region",
    "trb_rollout",
    "reference_update",
    "kernels",
    "harvest",
    "sae_training",
    "sae_methods",
    "kron_claims",
    "tr_align_betas",
)
LONG = ("sae_rates", "gemma_dictionaries", "gemma_align", "gemma_distill", "gpu", "gpu_trust_region")
"""Run only when named: they take long, or a GPU."""


def main() -> int:
    """0 if every script ran, whatever it found; 1 if one could not be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Trimtab beside its peers.")
    listed = f"{', '.join(SCRIPTS)}; only when named: {', '.join(LONG)}"
    parser.add_argument("names", nargs="*", metavar="name", help=f"which to run: {listed}")
    names = parser.parse_args().names or SCRIPTS
    for name in names:
        if name not in SCRIPTS + LONG:
            parser.error(f"{name!r} is none of {listed}")
    failed = [
        name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT).returncode
    ]
    console = Console(soft_wrap=True, highlight=False)
    if ran := [name for name in names if name not in failed]:
        for line in shortfalls(ran):
            console.print(line)
    for name in failed:
        console.print(f"[bold red]{name} could not be run; what it printed is above[/]")
    return 1 if failed else 0


def shortfalls(names: list[str]) -> list[str]:
    """A line for each figure that misses its target, or one that says that none does."""
    missed = [(name, row) for name in names for row in read_rows(name) if row["met"] is False]
    lines = [f"SHORT  {name}: {row['name']}: {_said(row)}, target {row['target']}" for name, row in missed]
    return lines or ["Every figure meets its target."]


def _said(row: dict[str, float | None]) -> str:
    quantities = {name: row[name] for name in ("ours", "peer", "ratio", "difference")}
    return ", ".join(f"{name} {value:.4g}" for name, value in quantities.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
