"""What the long benchmarks of real models share: arms that are run one after another, each once.

An arm's figures become rows "ARM: FIGURE" beside those of another arm, and go to the script's file as soon as the arm
is done; an arm that has rows there is not run again. So a run that was stopped is started again by the same command,
and an arm is measured anew when its rows are deleted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS, Row, cpu_seconds, print_table, read_rows

__all__ = ["Arm", "Figure", "parse_arguments", "run_arms"]

Figure = tuple[float, str]
"""A value and its unit."""


@dataclass(frozen=True)
class Arm:
    """What is run under a name; `peer` names the arm, earlier in the list, whose figures stand beside it."""

    name: str
    run: Callable[[], Mapping[str, Figure]]
    peer: str | None = None


def parse_arguments(script: str, names: Sequence[str], steps: int) -> argparse.Namespace:
    """`arms`, and `steps`, which is None for a run that counts."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{script}")
    parser.add_argument("--arms", nargs="+", choices=names, default=list(names), metavar="ARM", help="; ".join(names))
    parser.add_argument(
        "--steps", type=int, help=f"a trial of so many steps instead of {steps}: on few samples, and nothing is written"
    )
    return parser.parse_args()


def run_arms(script: str, arms: Sequence[Arm], chosen: Sequence[str], *, directory: Path | None = RESULTS) -> None:
    """Run the `chosen` ones of `arms` in their order and those that they stand beside; with no `directory`, write none.

    Prints each arm's rows when it is done, and which arms had theirs already.
    """
    beside = {arm.peer for arm in arms if arm.name in chosen}
    found: dict[str, Figure] = {}
    for arm in arms:
        if arm.name not in chosen and arm.name not in beside:
            continue
        stored = read_rows(script, directory=directory) if directory else []
        mine = {row["name"]: (row["ours"], row["unit"]) for row in stored if row["name"].startswith(f"{arm.name}: ")}
        if mine:
            print(f"{script}: {arm.name} has its rows")
            found |= mine
            continue
        print(f"{script}: {arm.name}", flush=True)
        wall, cpu = time.perf_counter(), cpu_seconds()
        figures = arm.run()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        rows = []
        for figure, (value, unit) in figures.items():
            found[f"{arm.name}: {figure}"] = value, unit
            peer, _ = found.get(f"{arm.peer}: {figure}", (None, ""))
            version = arm.peer if peer is not None else None
            rows.append(
                Row(
                    name=f"{arm.name}: {figure}",
                    unit=unit,
                    ours=value,
                    peer=peer,
                    peer_version=version,
                    repeats=1,
                    cpu_seconds=cpu,
                    wall_seconds=wall,
                )
            )
        print_table(f"{script}: {arm.name}, {wall / 60:.1f} min", rows)
        if directory is not None:
            _append(script, rows, directory)


def _append(script: str, rows: Sequence[Row], directory: Path) -> None:
    from trimtab.core.files import write_file
    from trimtab.core.results import environment

    where = environment()
    every = read_rows(script, directory=directory) + [row.to_json(where) for row in rows]
    write_file(directory / f"{script}.json", (json.dumps(every, indent=2) + "\n").encode())
