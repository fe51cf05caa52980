"""The report's file: what it holds, how it is packed, what it refuses. The page itself: tests/browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import TrimtabError
from trimtab.gallery import report
from trimtab.gallery.report import DictionaryPage, render

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "\" onload='alert(1)' x=\"",
    "&lt;b&gt; \n\r\t \u2028\u2029",
    "\ud800 \udfff \ufffd \0",
    "🦊 שלום \u202e",
    "{{ 7 * 7 }} {% raw %}",
    "",
]


def dictionary(**changes: Any) -> DictionaryPage:
    fields: dict[str, Any] = {
        "title": "Layer 9",
        "model": "made-up/model",
        "place": "resid.9",
        "n_latents": 7,
        "k": 2,
        "d_in": 5,
        "metrics": {"explained_variance": 0.75, "l0": 2, "dead_fraction": 1 / 7},
        "curves": {"loss": [[100, 1.5], [200, 0.5]]},
        "densities": [0.0, 1e-5, 0.001, 0.0011, 0.02, 0.5, 1.0],
        "selection": "All that fired.",
        "tokens": ["unused", " king", "\n", "queen", *HOSTILE],
        "latents": [
            latent(4, contexts=[{"tokens": [1, 3, 2], "activations": [0.0, 5.0, 0.004]}]),
            latent(2, contexts=[]),
        ],
    }
    return DictionaryPage(**{**fields, **changes})


def latent(identity: int, **changes: Any) -> dict[str, Any]:
    plain = {"id": identity, "density": 0.02, "max_activation": 5.0, "promoted": [[3, 1.25]], "suppressed": [[1, -2]]}
    return {**plain, "contexts": [], **changes}


def arm(name: str, role: str, values: list[float], **changes: Any) -> dict[str, Any]:
    mean = sum(values) / len(values) if values else None
    return {"name": name, "role": role, "values": values, "mean": mean, "ci_low": None, "ci_high": None, **changes}


def entry(**changes: Any) -> dict[str, Any]:
    fields = {
        "method": "TopK dictionary",
        "claim": "It keeps more variance.",
        "metric": "explained variance",
        "higher_is_better": True,
        "arms": [
            arm("TopK", "method", [0.75, 0.77], ci_low=0.74, ci_high=0.78),
            arm("ReLU", "baseline", [0.66, 0.65], ci_low=0.64, ci_high=0.67),
        ],
        "verdict": "shown",
        "comparison": "TopK leads by 0.105.",
        "paper_figure": "0.9 in the paper",
        "seconds": 75.4,
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "made-up", "cores": 2, "gpu": None},
    }
    return {**fields, **changes}


class Tags(HTMLParser):
    """All start tags with their attributes, the text, and the content of script elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text += data


def rendered(tmp_path: Path, **arguments: Any) -> Tags:
    defaults: dict[str, Any] = {"title": "A report", "results": None, "dictionaries": []}
    out = render(tmp_path / "report.html", **{**defaults, **arguments})
    return Tags(out.read_text(encoding="utf-8"))


def shown(tmp_path: Path, *entries: dict[str, Any]) -> Tags:
    return rendered(tmp_path, results={"format_version": 1, "methods": list(entries)})


def data_of(tags: Tags) -> dict[str, Any]:
    (data,) = [json.loads(text) for text in tags.scripts if text.startswith("{")]
    return data


def flat(data: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """The contexts' tokens as strings and their activations as bytes, one context after the other."""
    width = "<u4" if data["wide"] else "<u2"
    indices = np.frombuffer(base64.b64decode(data["context_tokens"]), width)
    return [data["tokens"][i] for i in indices], np.frombuffer(base64.b64decode(data["context_activations"]), np.uint8)


def test_json_goes_there_and_back() -> None:
    page = dictionary()
    assert DictionaryPage.from_json(page.to_json()) == page


def test_nan_in_metrics_and_curves_goes_there_and_back_as_strict_json() -> None:
    page = dictionary(metrics={"ce_recovered": math.nan}, curves={"loss": [[1, 2.0], [2, math.nan]]})
    text = page.to_json()
    assert "NaN" not in text
    back = DictionaryPage.from_json(text)
    assert math.isnan(back.metrics["ce_recovered"])
    assert back.curves["loss"][0] == [1, 2.0]
    assert math.isnan(back.curves["loss"][1][1])


def test_packing_keeps_tokens_exactly_and_activations_to_a_255th(tmp_path: Path) -> None:
    draw = random.Random(0)
    contexts = [
        {
            "tokens": [draw.randrange(1, 13) for _ in range(n)],
            "activations": [draw.choice([0.0, 3 * draw.random()])] * n,
        }
        for n in (1, 7, 0, 33)
    ]
    page = dictionary(latents=[latent(1, max_activation=3.0, contexts=contexts[:3]), latent(6, contexts=contexts[3:])])
    data = data_of(rendered(tmp_path, dictionaries=[page]))
    tokens, levels = flat(data)
    assert tokens == [page.tokens[token] for context in contexts for token in context["tokens"]]
    scales = [3.0] * 8 + [5.0] * 33
    activations = [activation for context in contexts for activation in context["activations"]]
    np.testing.assert_allclose(levels * np.array(scales) / 255, activations, atol=5.0 / 255)
    assert [[length for length, _ in item["contexts"]] for item in data["latents"]] == [[1, 7, 0], [33]]
    assert "unused" not in data["tokens"]


def test_firing_is_never_rounded_away_and_the_peak_is_exact(tmp_path: Path) -> None:
    data = data_of(rendered(tmp_path, dictionaries=[dictionary()]))
    tokens, levels = flat(data)
    assert (tokens, levels.tolist()) == ([" king", "queen", "\n"], [0, 255, 1])
    (length, peak) = data["latents"][0]["contexts"][0]
    assert (length, peak) == (3, 5.0)


def test_a_long_string_table_takes_wide_indices(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(70_000)]
    contexts = [{"tokens": list(range(70_000)), "activations": [0.0] * 70_000}]
    data = data_of(rendered(tmp_path, dictionaries=[dictionary(tokens=tokens, latents=[latent(0, contexts=contexts)])]))
    assert data["wide"]
    assert flat(data)[0] == tokens


def test_the_histogram_counts_every_latent_and_the_dead_apart(tmp_path: Path) -> None:
    draw = random.Random(1)
    densities = [draw.choice([0.0, 10 ** draw.uniform(-6, 0)]) for _ in range(301)]
    latents = [latent(i, density=density) for i, density in enumerate(densities)]
    page = dictionary(n_latents=301, densities=densities, latents=latents)
    data = data_of(rendered(tmp_path, dictionaries=[page]))
    histogram = data["histogram"]
    edges = 10 ** (histogram["low"] + np.arange(len(histogram["counts"]) + 1) / histogram["per_decade"])
    alive = [density for density in densities if density > 0]
    np.testing.assert_array_equal(histogram["counts"], np.histogram(alive, edges)[0])
    assert histogram["dead"] == densities.count(0.0)
    bins = [item["bin"] for item in data["latents"]]
    assert [bins.count(i) for i in range(-1, len(histogram["counts"]))] == [histogram["dead"], *histogram["counts"]]


@pytest.mark.parametrize("densities", [[0.0] * 7, [1.0] * 7, [1e-30, *[0.5] * 6]])
def test_extreme_densities_have_a_histogram(tmp_path: Path, densities: list[float]) -> None:
    histogram = data_of(rendered(tmp_path, dictionaries=[dictionary(densities=densities, latents=[])]))["histogram"]
    assert sum(histogram["counts"]) + histogram["dead"] == 7


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    points = [[i, math.inf if i == 0 else 1 / i] for i in range(5_001)]
    data = data_of(rendered(tmp_path, dictionaries=[dictionary(curves={"loss": points, "empty": []})]))
    loss = data["curves"]["loss"]
    assert len(loss) == 400
    assert (loss[0], loss[-1]) == ([0, None], [5_000, 0.0002])
    assert data["curves"]["empty"] == []


def full_size(seed: int) -> DictionaryPage:
    draw = np.random.default_rng(seed)
    tokens = [f" token{i}" for i in range(50_000)]
    latents = [
        latent(
            i,
            promoted=[[int(token), 0.123456] for token in draw.integers(0, 50_000, 10)],
            suppressed=[[int(token), -0.123456] for token in draw.integers(0, 50_000, 10)],
            contexts=[
                {"tokens": draw.integers(0, 50_000, 32).tolist(), "activations": draw.uniform(0, 5, 32).tolist()}
                for _ in range(8)
            ],
        )
        for i in range(report.MAX_LATENTS)
    ]
    densities = draw.uniform(0, 0.01, 16_384).tolist()
    return dictionary(n_latents=16_384, densities=densities, tokens=tokens, latents=latents)


def test_two_full_dictionaries_stay_well_under_the_limit(tmp_path: Path) -> None:
    rendered(tmp_path, dictionaries=[full_size(0), full_size(1)])
    assert (tmp_path / "report.html").stat().st_size < 0.6 * report.MAX_BYTES


def test_a_page_that_is_too_large_is_refused_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr(report, "MAX_BYTES", 20_000)
    with pytest.raises(TrimtabError, match=r"would be 0\.\d MB; at most 0 MB"):
        rendered(tmp_path, dictionaries=[dictionary()])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"title": "A", "results": {"methods": [entry()]}, "dictionaries": [dictionary()]}
    first = render(tmp_path / "new" / "a.html", **arguments)
    second = render(tmp_path / "new" / "b.html", **arguments)
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_fetched_and_only_our_scripts_may_run(tmp_path: Path) -> None:
    tags = rendered(tmp_path, results={"methods": [entry(), entry(method="Other")]}, dictionaries=[dictionary()])
    references = [
        value
        for _, attributes in tags.tags
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset", "poster")
    ]
    assert [value for value in references if not value.startswith(("#", "data:image/svg+xml,"))] == []
    assert [name for _, attributes in tags.tags for name in attributes if name.startswith("on")] == []
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [attributes["content"] for _, attributes in tags.tags if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    ours = [text for text in tags.scripts if not text.startswith("{")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in ours]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_hostile_text_adds_no_element(tmp_path: Path) -> None:
    def page(text: str) -> Tags:
        hostile = entry(
            method=f"m{text}",
            claim=text,
            metric=text,
            comparison=text,
            paper_figure=text,
            versions={text: text},
            machine=text,
            arms=[arm(text, "method", [1.0]), arm(text, "baseline", [], error=f"failed {text}")],
        )
        dictionaries = [
            dictionary(title=text, model=text, place=text, selection=text, metrics={text: 1}, curves={text: [[1, 1]]})
        ]
        return rendered(tmp_path, title=text, results={"methods": [hostile]}, dictionaries=dictionaries)

    names = [tag for tag, _ in page("plain").tags]
    for text in HOSTILE:
        tags = page(text)
        assert [tag for tag, _ in tags.tags] == names
        assert [name for _, attributes in tags.tags for name in attributes if name.startswith("on")] == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(), max_size=12), st.sampled_from(HOSTILE)), min_size=1, max_size=6))
def test_any_token_survives_inside_the_script_element(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[str]
) -> None:
    contexts = [{"tokens": list(range(len(tokens))), "activations": [1.0] * len(tokens)}]
    latents = [latent(0, promoted=[], suppressed=[], contexts=contexts)]
    out = render(
        tmp_path_factory.getbasetemp() / "tokens.html",
        title="",
        results=None,
        dictionaries=[dictionary(tokens=tokens, latents=latents)],
    )
    html = out.read_text(encoding="utf-8")
    raw = re.search(r'<script type="application/json" class="data">(.*?)</script>', html, re.S)[1]
    assert not set(raw) & set("<>&\n")
    assert flat(json.loads(raw))[0] == tokens


def test_a_method_shows_what_was_measured_and_what_the_paper_says(tmp_path: Path) -> None:
    text = " ".join(shown(tmp_path, entry(seeds=[0, 1], quick=True, date="2026-01-02")).text.split())
    for part in (
        "TopK dictionary ✓ shown",
        "It keeps more variance.",
        "Measured here quick run TopK leads by 0.105.",
        "explained variance (higher is better)",
        "TopK method",
        "0.760 0.740 to 0.780 0.750 0.770",
        "ReLU baseline",
        "0.655 0.640 to 0.670 0.660 0.650",
        "In the paper 0.9 in the paper",
        "date 2026-01-02 seeds 0, 1 took 1 min 15 s cpu made-up cores 2 torch 2.13.0",
    ):
        assert part in text
    assert "committed full run" not in text


def test_the_full_run_stands_beside_a_quick_one_on_the_same_axis(tmp_path: Path) -> None:
    full = entry(
        arms=[arm("TopK", "method", [9.5]), arm("ReLU", "baseline", [7.5])], comparison="By 2.0.", verdict="shown"
    )
    tags = shown(tmp_path, entry(verdict="inconclusive", quick=True, full_run={**full, "date": "2026-01-01"}))
    text = " ".join(tags.text.split())
    assert "~ inconclusive" in text
    assert "The committed full run ✓ shown 2026-01-01 By 2.0." in text
    grid = [attributes["x1"] for tag, attributes in tags.tags if attributes.get("class") == "grid"]
    assert len(set(grid)) == len(grid) / 4 >= 2


def test_failures_are_shown_in_full_or_in_part(tmp_path: Path) -> None:
    arms = [
        arm("TopK", "method", [0.75, 0.77]),
        {**arm("ReLU", "baseline", [0.5]), "mean": None, "error": "RuntimeError: out of memory"},
        arm("Gated", "baseline", [], error="ValueError: no"),
        arm("Half", "baseline", [0.6], error="seed 1 diverged"),
    ]
    text = " ".join(shown(tmp_path, entry(arms=arms, verdict="inconclusive")).text.split())
    assert "ReLU baseline failed RuntimeError: out of memory measured before: 0.500" in text
    assert "Gated baseline failed ValueError: no" in text
    assert "Half failed in part seed 1 diverged" in text


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e-9, 2e-9], [-5.0, 3.0], [1e12, 1e12], [-7.0, -7.0], [math.nan, 0.5], [], [0.1, 1e6]]
)
def test_any_values_have_an_axis_inside_the_figure(tmp_path: Path, values: list[float]) -> None:
    arms = [arm("TopK", "method", values, error=None if values else "failed")]
    tags = shown(tmp_path, entry(arms=arms))
    places = [
        float(attributes[name].removesuffix("%"))
        for tag, attributes in tags.tags
        for name in ("cx", "x1", "x")
        if tag in ("circle", "line", "text") and name in attributes
    ]
    assert len(places) >= 2
    assert all(0 <= place <= 100 for place in places)


def test_pictures_that_belong_to_an_experiment_are_in_the_page(tmp_path: Path) -> None:
    picture = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (tmp_path / "KronSAE").mkdir()
    (tmp_path / "KronSAE" / "the-curve.svg").write_bytes(picture)
    names = ["KronSAE/the-curve.svg", "KronSAE/gone.svg", "x.bin"]
    found = {"format_version": 1, "methods": [entry(attachments=names)]}
    tags = rendered(tmp_path, results=found, attachments=tmp_path)
    images = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["the curve"]
    kind, data = images[0]["src"].split(",")
    assert kind == "data:image/svg+xml;base64"  # an image, which runs no script
    assert base64.b64decode(data) == picture
    assert "img" not in [tag for tag, _ in rendered(tmp_path, results=found).tags]


def test_other_figures_and_a_failed_attachment_are_shown(tmp_path: Path) -> None:
    arms = [
        arm("TopK", "method", [0.75, 0.77], figures={"dead_fraction": [0.1, 0.2], "l0": [32, 32]}),
        arm("ReLU", "baseline", [0.5], figures={"l0": [40.5]}),
        arm("Gated", "baseline", [], error="no", figures={"l0": []}),
    ]
    text = " ".join(shown(tmp_path, entry(arms=arms, attachment_error="OSError: the disk is full")).text.split())
    assert "could not be made OSError: the disk is full" in text
    assert "arm dead fraction l0 TopK 0.15 32 ReLU – 40.5 Gated – –" in text


def test_metrics_are_explained_and_unknown_ones_are_named(tmp_path: Path) -> None:
    metrics = {"my_metric": 12345.6, "l0": 32, "explained_variance": 0.76341, "dead_fraction": 0.0703, "loss": math.nan}
    text = " ".join(rendered(tmp_path, dictionaries=[dictionary(metrics=metrics)]).text.split())
    assert "Explained variance 0.7634 Share of the activations' variance" in text
    assert "Active latents (L0) 32 Mean number" in text
    assert "Dead latents 7.03 %" in text
    assert "my metric 12,346 loss –" in text


def test_cross_entropy_is_a_strip_between_clean_and_ablated(tmp_path: Path) -> None:
    metrics = {"ce_clean": 3.0, "ce_spliced": 3.5, "ce_ablated": 8.0}
    tags = rendered(tmp_path, dictionaries=[dictionary(metrics=metrics)])
    assert [attributes["cx"] for tag, attributes in tags.tags if tag == "circle"] == ["10.0%"]
    assert "spliced 3.5" in " ".join(tags.text.split())
    without = rendered(tmp_path, dictionaries=[dictionary(metrics={"ce_clean": 3.0, "ce_spliced": 3.5})])
    assert "Cross-entropy, spliced 3.5" in " ".join(without.text.split())


def test_an_empty_report_says_so(tmp_path: Path) -> None:
    assert "There is nothing to report yet." in rendered(tmp_path).text
    assert "No experiment has been run yet." in shown(tmp_path).text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_latents": 8}, "densities holds 7 values; n_latents=8"),
        ({"densities": [0.0] * 6 + [1.5]}, r"outside 0\.\.1"),
        ({"densities": [0.0] * 6 + [math.nan]}, r"outside 0\.\.1"),
        ({"latents": [latent(2), latent(2)]}, "id=2 is repeated"),
        ({"latents": [latent(7)]}, r"id=7 is repeated or outside 0\.\.6"),
        ({"latents": [latent(1, density=2.0)]}, "latent 1: density and max_activation"),
        ({"latents": [latent(1, max_activation=math.inf)]}, "latent 1: density and max_activation"),
        ({"latents": [latent(1, promoted=[[99, 1.0]])]}, r"latent 1: a token index is outside 0\.\.12"),
        ({"latents": [latent(1, suppressed=[[1, math.nan]])]}, "latent 1: a promoted or suppressed logit"),
        ({"latents": [latent(1, contexts=[{"tokens": [-1], "activations": [0.0]}])]}, "token index is outside"),
        ({"latents": [latent(1, contexts=[{"tokens": [1, 2], "activations": [0.0]}])]}, "differ in length"),
        ({"latents": [latent(1, contexts=[{"tokens": [1], "activations": [math.nan]}])]}, "NaN or infinity"),
    ],
)
def test_pages_that_disagree_with_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        dictionary(**changes)


def test_more_latents_than_a_page_holds_are_refused() -> None:
    n = report.MAX_LATENTS + 1
    with pytest.raises(TrimtabError, match="latents holds 2001 items; at most 2000 are accepted"):
        dictionary(n_latents=n, densities=[0.1] * n, latents=[latent(i) for i in range(n)])


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"title": "x"}'])
def test_other_json_is_not_a_page(text: str) -> None:
    with pytest.raises(TrimtabError, match="a dictionary's page"):
        DictionaryPage.from_json(text)


@pytest.mark.parametrize("change", [{"metrics": None}, {"latents": [{"id": 1}]}, {"curves": {"loss": [1]}}])
def test_malformed_json_pages_are_refused(change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads(dictionary().to_json()), **change})
    with pytest.raises(TrimtabError, match="malformed"):
        DictionaryPage.from_json(text)


@pytest.mark.parametrize("key", ["method", "claim", "arms", "verdict", "comparison", "paper_figure", "machine"])
def test_results_without_a_needed_key_are_refused(tmp_path: Path, key: str) -> None:
    broken = entry()
    del broken[key]
    with pytest.raises(TrimtabError, match=f"has no '{key}'"):
        shown(tmp_path, broken)
    with pytest.raises(TrimtabError, match=f"has no '{key}'"):
        shown(tmp_path, entry(full_run=broken))


def test_other_bad_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="results has no 'methods'"):
        rendered(tmp_path, results={"format_version": 1})
    with pytest.raises(TrimtabError, match="verdict='maybe' is not known"):
        shown(tmp_path, entry(verdict="maybe"))
    with pytest.raises(TrimtabError, match="has no 'role'"):
        shown(tmp_path, entry(arms=[{"name": "TopK"}]))
