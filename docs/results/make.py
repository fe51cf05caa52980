"""Write the tables of this folder from what was measured: `python docs/results/make.py [DIR]`.

    benchmarks.md      from benchmarks/results/*.json, which `make bench` writes
    SCRIPT.md          from those of OF_ARMS: a line an arm, a column a figure
    gallery-METHOD.md  from src/trimtab/gallery/full_results/METHOD.json, the committed entry of a full gallery run

With DIR, the output of `trimtab gallery run --out DIR`, its full entries become the committed ones first, and their
figures go to docs/figures. The pages of the documentation include the tables; a test compares them with their sources.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
FULL_RESULTS = ROOT / "src" / "trimtab" / "gallery" / "full_results"
NOTHING = "*No figures are committed yet.*\n"
OF_ARMS = ("gemma_align", "gemma_distill", "tr_align_betas")


def pages() -> dict[str, str]:
    """The text of each table file, by its name."""
    return {"benchmarks.md": _benchmarks()} | {f"{script}.md": _arms(script) for script in OF_ARMS} | _gallery()


def _benchmarks() -> str:
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem in OF_ARMS:
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))
        lines = ["| figure | ours | peer | unit | ratio | target | met |", "|---|---:|---:|---|---:|---|---|"]
        for row in rows:
            peer = _number(row["peer"]) + (f" ({row['peer_version']})" if row["peer_version"] else "")
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            cells = [
                row["name"],
                _number(row["ours"]),
                peer,
                row["unit"],
                _number(row["ratio"]),
                row["target"] or "",
                met,
            ]
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
        repeats = ", ".join(str(number) for number in sorted({row["repeats"] for row in rows}))
        note = f"`python -m benchmarks {path.stem}`, {repeats} repeats, {_where(rows[0])}."
        parts.append(f"**{path.stem}**\n\n" + "\n".join(lines) + f"\n\n{note}\n")
    return "\n".join(parts) or NOTHING


def _arms(script: str) -> str:
    """Rows "ARM: FIGURE" as a table of arms and figures, the order of both that of the rows."""
    path = RESULTS / f"{script}.json"
    if not path.exists():
        return NOTHING
    rows = json.loads(path.read_text(encoding="utf-8"))
    arms: dict[str, dict[str, str]] = {}
    heads: dict[str, str] = {}
    for row in rows:
        arm, figure = row["name"].split(": ", 1)
        arms.setdefault(arm, {})[figure] = _number(row["ours"])
        heads[figure] = figure if row["unit"] == "1" else f"{figure} ({row['unit']})"
    lines = [
        f"| arm | {' | '.join(_cell(head) for head in heads.values())} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {_cell(arm)} | {' | '.join(found.get(figure, '') for figure in heads)} |" for arm, found in arms.items()),
    ]
    seeds = "one seed" if rows[-1]["seeds"] == 1 else f"{rows[-1]['seeds']} seeds"
    return "\n".join(lines) + f"\n\n`python -m benchmarks {script}`, {seeds}, {_where(rows[-1])}.\n"


def _gallery() -> dict[str, str]:
    tables = {}
    for path in sorted(FULL_RESULTS.glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        better = "higher" if entry["higher_is_better"] else "lower"
        lines = [f"| arm | {entry['metric']} ({better} is better) | 95 % interval |", "|---|---:|---|"]
        for arm in entry["arms"]:
            low, high = arm["ci_low"], arm["ci_high"]
            interval = "" if low is None else f"{low:.4g} to {high:.4g}"
            value = _number(arm["mean"]) or f"failed: {arm.get('error')}"
            lines.append(f"| {_cell(arm['name'])} ({arm['role']}) | {_cell(value)} | {interval} |")
        seeds = len(entry["seeds"])
        tables[f"gallery-{entry['method']}.md"] = (
            f"**{entry['method']}: {entry['verdict']}.** Claim: {entry['claim']}\n\n"
            + "\n".join(lines)
            + f"\n\n{entry['comparison']} The paper reports: {entry['paper_figure']}.\n\n"
            f"`trimtab gallery run {entry['method']} --out results`, {seeds} seeds, {_where(entry)}.\n"
        )
    return tables


def _where(entry: dict[str, Any]) -> str:
    """Versions, machine and date of a figure, for its caption."""
    machine, versions = entry["machine"], entry["versions"]
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"torch {versions['torch']}, transformers {versions['transformers']}, {processor}, {entry['date']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _commit(directory: Path) -> None:
    """Put every full, faultless entry of a gallery run where the package keeps them."""
    FULL_RESULTS.mkdir(exist_ok=True)
    for entry in json.loads((directory / "results.json").read_text(encoding="utf-8"))["methods"]:
        failed = [arm["name"] for arm in entry["arms"] if arm.get("error")]
        if entry["quick"] or failed:
            print(f"{entry['method']}: not taken, {'a quick run' if entry['quick'] else f'failed: {failed}'}")
            continue
        for figure in (directory / name for name in entry["attachments"] if name.endswith(".svg")):
            FIGURES.mkdir(exist_ok=True)
            shutil.copyfile(figure, FIGURES / f"{entry['method']}-{figure.name}")
        text = json.dumps(entry | {"attachments": []}, indent=1, ensure_ascii=False) + "\n"
        (FULL_RESULTS / f"{entry['method']}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        _commit(Path(argument))
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
