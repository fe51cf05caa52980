"""The report: measured methods and browsable dictionaries in one self-contained HTML file.

`render` writes a page that makes no network request: styles, scripts, figures and data are inside the
file, and its Content-Security-Policy forbids everything else. What does not change is written as HTML;
the latents that are browsed travel as JSON in `<script type="application/json">` (see `dictionary_page`).
Text reaches the page through Jinja's autoescaping or, in the browser, through `textContent` only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.files import write_file
from trimtab.core.results import CONFIDENCE
from trimtab.gallery.dictionary_page import MAX_LATENTS, DictionaryPage, packed

__all__ = ["MAX_BYTES", "MAX_LATENTS", "DictionaryPage", "render"]

MAX_BYTES = 15_000_000

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("dom.js", "charts.js", "latents.js", "report.js")
_VERDICT_MARKS = {"shown": "✓", "not shown": "✕", "inconclusive": "~"}
_ENTRY_KEYS = (
    *("method", "claim", "metric", "higher_is_better", "arms", "verdict", "comparison", "paper_figure"),
    *("seconds", "versions", "machine"),
)
_METRICS = {  # key: (label, one line of explanation)
    "explained_variance": (
        "Explained variance",
        "Share of the activations' variance that the reconstruction keeps: 1 − Σ‖x − x̂‖² / Σ‖x − mean x‖².",
    ),
    "explained_variance_without_top_dimension": (
        "… without the top dimension",
        "The same without the dimension of largest variance, which flatters the figure when it is massive.",
    ),
    "explained_variance_legacy": (
        "… legacy form",
        "Mean over tokens of each token's own 1 − ‖x − x̂‖² / ‖x − mean x‖², as older tools log it.",
    ),
    "l0": ("Active latents (L0)", "Mean number of latents that fire on a token."),
    "dead_fraction": ("Dead latents", "Share of the latents that never fired on the text measured."),
    "ce_recovered": (
        "Cross-entropy recovered",
        "(ablated − spliced) / (ablated − clean): 1 if the splice costs the model nothing.",
    ),
    "ce_clean": ("Cross-entropy, clean", "The model as it is, in nats per token."),
    "ce_spliced": ("Cross-entropy, spliced", "The model with the reconstruction in the activations' place."),
    "ce_ablated": ("Cross-entropy, ablated", "The model with zero in the activations' place."),
    "tokens": ("Tokens read", "For the explained variances, L0 and dead latents."),
    "ce_tokens": ("Tokens predicted", "For the cross-entropies."),
}
_CROSS_ENTROPIES = ("ce_clean", "ce_spliced", "ce_ablated")


def render(
    out: Path,
    *,
    title: str,
    results: Mapping[str, Any] | None,
    dictionaries: Sequence[DictionaryPage],
    attachments: Path | None = None,
) -> Path:
    """Write the report to `out`, aside first and then renamed, and return `out`.

    `results` is the content of `results.json`, or None where no experiment was run; `attachments` the directory that
    it lies in, whose pictures (.svg) that belong to an experiment are shown with it. Raises `TrimtabError` for
    results without a key that the page needs and for a page larger than `MAX_BYTES` (nothing is written).
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    early = (_TEMPLATES / "theme.js").read_text(encoding="utf-8")
    parts = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}}})();'
    entries = None if results is None else _need(results, "methods", "results")
    html = environment.get_template("report.html.j2").render(
        title=title,
        policy=_policy(early, script),
        confidence=f"{CONFIDENCE:.0%} interval",
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        early=Markup(early),
        script=Markup(script),
        methods=None if entries is None else [_method(entry, attachments) for entry in entries],
        dictionaries=[_dictionary(page) for page in dictionaries],
    )
    # Lone surrogates cannot be encoded and NUL is not allowed in HTML; inside JSON both are escapes by now.
    data = re.sub("[\ud800-\udfff\0]", "\ufffd", html).encode("utf-8")
    if len(data) > MAX_BYTES:
        raise TrimtabError(
            f"the report would be {len(data) / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB are accepted. "
            "Show fewer latents, contexts or dictionaries."
        )
    write_file(out, data)
    return out


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _method(entry: Mapping[str, Any], attachments: Path | None) -> dict[str, Any]:
    """What the template shows of one method; this run and the committed full run share one axis."""
    full = entry.get("full_run")
    runs = [entry] if full is None else [entry, full]
    for run in runs:
        for key in _ENTRY_KEYS:
            _need(run, key, f"results of {run.get('method', 'a method')!r}")
        if run["verdict"] not in _VERDICT_MARKS:
            raise unknown("verdict", run["verdict"], _VERDICT_MARKS)
    numbers = [number for run in runs for arm in run["arms"] for number in _numbers(arm)]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - margin, high + margin
    views = [_run(run, low, high, attachments) for run in runs]
    return {
        "name": entry["method"],
        "anchor": "methods/" + re.sub(r"[^a-z0-9]+", "-", str(entry["method"]).lower()).strip("-"),
        "claim": entry["claim"],
        "paper": entry["paper_figure"],
        "metric": entry["metric"],
        "higher_is_better": entry["higher_is_better"],
        "run": views[0],
        "full": views[1] if full is not None else None,
    }


def _numbers(arm: Mapping[str, Any]) -> list[float]:
    found = [arm.get("mean"), arm.get("ci_low"), arm.get("ci_high"), *(arm.get("values") or [])]
    return [float(number) for number in found if _finite(number) is not None]


def _run(run: Mapping[str, Any], low: float, high: float, attachments: Path | None) -> dict[str, Any]:
    seeds = run.get("seeds")
    facts = {
        "date": run.get("date"),
        "seeds": ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple) else seeds,
        "took": _duration(run["seconds"]),
        **(run["machine"] if isinstance(run["machine"], Mapping) else {"machine": run["machine"]}),
        **run["versions"],
    }
    ticks = [(100 * (tick - low) / (high - low), f"{tick:.6g}".replace("-", "−")) for tick in _ticks(low, high)]
    return {
        "verdict": run["verdict"],
        "mark": _VERDICT_MARKS[run["verdict"]],
        "comparison": run["comparison"],
        "quick": bool(run.get("quick")),
        "date": run.get("date"),
        "arms": [_arm(arm, low, high) for arm in run["arms"]],
        "figure_names": list(dict.fromkeys(name for arm in run["arms"] for name in arm.get("figures", {}))),
        "pictures": _pictures(run, attachments),
        "attachment_error": run.get("attachment_error"),
        "ticks": [(round(at, 2), label) for at, label in ticks],
        "facts": {key: value for key, value in facts.items() if value is not None},
    }


def _pictures(run: Mapping[str, Any], attachments: Path | None) -> list[tuple[str, str]]:
    """What each picture is called, and the picture in the form of an address: as an image it cannot run scripts."""
    if attachments is None:
        return []
    paths = [attachments / name for name in run.get("attachments", []) if name.endswith(".svg")]
    return [
        (path.stem.replace("-", " "), "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode())
        for path in paths
        if path.is_file()
    ]


def _arm(arm: Mapping[str, Any], low: float, high: float) -> dict[str, Any]:
    """The arm's numbers as text, with as many decimals as the axis needs, and as places on it (0 to 100)."""
    decimals = max(0, 2 - math.floor(math.log10(high - low)))

    def text(number: float | int) -> str:
        return (f"{number:,.{decimals}f}" if decimals <= 6 else f"{number:.6g}").replace("-", "−")

    def place(number: float | int | None) -> float | None:
        return None if number is None else round(100 * (number - low) / (high - low), 2)

    mean, ci_low, ci_high = (_finite(arm.get(key)) for key in ("mean", "ci_low", "ci_high"))
    values = [value for value in arm.get("values") or [] if _finite(value) is not None]
    return {
        "name": _need(arm, "name", "an arm"),
        "is_method": _need(arm, "role", "an arm") == "method",
        "error": arm.get("error"),
        "mean": None if mean is None else text(mean),
        "interval": None if ci_low is None or ci_high is None else f"{text(ci_low)} to {text(ci_high)}",
        "values": [text(value) for value in values],
        "figures": {name: _figure(sum(found) / len(found)) for name, found in arm.get("figures", {}).items() if found},
        "at": place(mean),
        "at_low": place(ci_low),
        "at_high": place(ci_high),
        "dots": [place(value) for value in values],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers inside `low..high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _duration(seconds: float | int) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _dictionary(page: DictionaryPage) -> dict[str, Any]:
    """What the template shows of one dictionary, and the JSON that its browser reads."""
    cross_entropy = _cross_entropy(page.metrics)
    metrics = []
    for name, value in sorted(page.metrics.items(), key=_metric_order):
        if cross_entropy and name in _CROSS_ENTROPIES:
            continue
        label, explanation = _METRICS.get(name, (name.replace("_", " "), ""))
        figure = f"{_figure(100 * value, 3)} %" if name == "dead_fraction" else _figure(value)
        metrics.append({"label": label, "explanation": explanation, "value": figure})
    return {
        "page": page,
        "metrics": metrics,
        "cross_entropy": cross_entropy,
        "data": _embedded(packed(page)),
    }


def _metric_order(item: tuple[str, float | int]) -> int:
    names = list(_METRICS)
    return names.index(item[0]) if item[0] in _METRICS else len(names)


def _cross_entropy(metrics: Mapping[str, float | int]) -> dict[str, Any] | None:
    """Where the spliced model stands between clean (0) and ablated (100), if all three were measured."""
    clean, spliced, ablated = values = [_finite(metrics.get(name)) for name in _CROSS_ENTROPIES]
    if None in values or not clean < ablated:
        return None
    ends = [
        {"name": name.removeprefix("ce_"), "value": _figure(metrics[name]), "explanation": _METRICS[name][1]}
        for name in _CROSS_ENTROPIES
    ]
    return {"ends": ends, "at": round(min(100, max(0, 100 * (spliced - clean) / (ablated - clean))), 2)}


def _need(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise TrimtabError(f"{where} has no {key!r}; it has {sorted(mapping)}.")
    return mapping[key]


def _finite(value: Any) -> Any:
    return value if value is not None and math.isfinite(value) else None


def _figure(value: float | int, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}").replace("-", "−")


def _embedded(value: Any) -> Any:
    """JSON that can stand inside a script element whatever its strings hold."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
