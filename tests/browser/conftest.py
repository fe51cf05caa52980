"""Chromium, and a report of full size about made-up results and dictionaries: every figure in it is invented."""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from trimtab.gallery.report import DictionaryPage, render

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

HOSTILE = [
    "</script><script>window.hacked = true</script>",
    "<img src=x onerror='window.hacked = true'>",
    "<!-- <script>",
    "]]>",
    "\"'`${window.hacked = true}&amp;",
    "javascript:window.hacked=true",
    "line\nbreak\ttab",
    "\u202eright to left override",
    "\ud800lone surrogate",
    "\ufffd",
    "\0nul",
    "\u2028separator",
    "🦊",
    "👩\u200d🚀",
    "שלום",
    "مرحبا",
    "",
    "   ",
]

WORDS = re.findall(
    "[a-z]+",
    """
    the of and to in a that he was it his her with as had for she not at but be on they have him
    which said from all this by there were one so when what out up into been their could them very
    would little who more now if some like then my old like time man eyes house night door sea ship
    wind sail rudder water harbour island king queen throne crown castle knight letter silver golden
    morning evening winter garden river mountain forest road horse carriage window candle mirror
    shadow silence music laughter sorrow memory whisper thunder lantern anchor captain sailor storm
    wave tide current compass chart voyage return begin end answer question reason number seven
    three hundred thousand first second last never always perhaps almost enough again together alone
    """,
)

HOSTILE_POSITION = 5


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium; Playwright's own is never downloaded.

    For a module, not for the session: while it is open, no other test could run an event loop of its own.
    """
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("NO CHROMIUM on this system: the pages are not tested (see `make system-packages`)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def dictionaries() -> list[DictionaryPage]:
    """Two dictionaries; the title of the first is hostile."""
    hostile_title = "Layer 6 </title><script>window.hacked = true</script>"
    return [dictionary(hostile_title, seed=0, hostile=True), dictionary("Layer 9", seed=1)]


@pytest.fixture(scope="session")
def hostile_latent(dictionaries: list[DictionaryPage]) -> int:
    """The id of the latent of the first dictionary whose top context is made of `HOSTILE` strings."""
    return dictionaries[0].latents[HOSTILE_POSITION]["id"]


@pytest.fixture(scope="session")
def report_url(dictionaries: list[DictionaryPage], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the rendered report."""
    out = tmp_path_factory.mktemp("report") / "index.html"
    render(out, title="A report \ud800 <b>", results=results(), dictionaries=dictionaries)
    return out.as_uri()


def dictionary(
    title: str, *, seed: int, n_latents: int = 4096, n_shown: int = 2000, hostile: bool = False
) -> DictionaryPage:
    """A page of `n_shown` latents with 8 contexts of 32 tokens, each firing on a word of its own."""
    draw = random.Random(seed)
    spaced = [f" {word}" for word in WORDS]
    tokens = [*WORDS, *spaced, "\n", ".", ",", "ing", "ed", *HOSTILE]
    n_plain = len(tokens) - len(HOSTILE)
    densities = [0.0 if draw.random() < 0.07 else min(1.0, 10 ** draw.gauss(-2.9, 0.55)) for _ in range(n_latents)]
    alive = [identity for identity in range(n_latents) if densities[identity] > 0]
    latents = []
    for identity in sorted(draw.sample(alive, n_shown)):
        favourite = len(WORDS) + draw.randrange(len(WORDS))
        top = draw.uniform(4, 40)
        contexts = [_context(draw, favourite, top * (1 - 0.06 * rank), n_plain) for rank in range(8)]
        if hostile and len(latents) == HOSTILE_POSITION:
            strange = list(range(n_plain, len(tokens)))
            contexts.insert(0, {"tokens": strange, "activations": [top] * len(strange)})
        latents.append(
            {
                "id": identity,
                "density": densities[identity],
                "max_activation": top,
                "promoted": _pairs(draw, favourite, n_plain, 1),
                "suppressed": _pairs(draw, draw.randrange(n_plain), n_plain, -1),
                "contexts": contexts,
            }
        )
    return DictionaryPage(
        title=title,
        model="made-up/model-270m",
        place=f"resid.{6 + 3 * seed}",
        n_latents=n_latents,
        k=32,
        d_in=640,
        metrics={
            "explained_variance": 0.7634,
            "explained_variance_without_top_dimension": 0.7121,
            "explained_variance_legacy": 0.7402,
            "l0": 32,
            "dead_fraction": sum(density == 0 for density in densities) / n_latents,
            "ce_recovered": 0.9312,
            "tokens": 131_072,
            "ce_tokens": 8_192,
            "ce_clean": 3.0123,
            "ce_spliced": 3.4012,
            "ce_ablated": 8.6644,
        },
        curves={
            "explained_variance": _curve(draw, 0.76, -0.76),
            "loss": _curve(draw, 0.24, 0.9),
        },
        densities=densities,
        selection=f"{n_shown:,} of {n_latents:,} latents: a random sample of those that fired.",
        tokens=tokens,
        latents=latents,
    )


def _curve(draw: random.Random, end: float, start: float) -> list[list[float]]:
    return [[500 * i, end + start * math.exp(-i / 80) + draw.gauss(0, 0.007)] for i in range(1, 600)]


def _context(draw: random.Random, favourite: int, peak: float, n_plain: int) -> dict[str, Any]:
    tokens = [len(WORDS) + min(int(draw.paretovariate(0.7)), len(WORDS)) - 1 for _ in range(32)]
    for place in range(9, 32, 11):
        tokens[place] = n_plain - draw.choice([4, 3])
    if draw.random() < 0.3:
        tokens[24] = n_plain - 5
    activations = [round(peak * draw.random() ** 3, 3) if draw.random() < 0.15 else 0.0 for _ in range(32)]
    tokens[17], activations[17] = favourite, peak
    return {"tokens": tokens, "activations": activations}


def _pairs(draw: random.Random, first: int, n_plain: int, sign: int) -> list[list[float]]:
    logits = sorted((draw.uniform(0.1, 1.4) for _ in range(10)), reverse=True)
    others = draw.sample(range(n_plain), 9)
    return [[index, sign * logit] for index, logit in zip([first, *others], logits, strict=True)]


def results() -> dict[str, Any]:
    """Three methods: one shown with its full run, one that did not show, one with a failing arm."""
    machine = {"cpu": "made-up processor, 2 cores", "memory": "8 GB", "system": "Linux"}
    versions = {"trimtab": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}

    def arm(name: str, role: str, *values: float, half: float | None) -> dict[str, Any]:
        mean = sum(values) / len(values)
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return {
            "name": name,
            "role": role,
            "values": list(values),
            "mean": mean,
            "ci_low": low,
            "ci_high": high,
        }

    def entry(method: str, verdict: str, **rest: Any) -> dict[str, Any]:
        shared = {"higher_is_better": True, "seconds": 192.4, "versions": versions, "machine": machine}
        return {
            "method": method,
            "verdict": verdict,
            **shared,
            "date": "2026-01-02",
            "full_run": None,
            **rest,
        }

    dense = {
        "claim": "TopK with AuxK keeps more variance at equal L0 than ReLU with an L1 penalty.",
        "metric": "explained variance at L0 = 32",
        "paper_figure": "Normalised MSE falls as a power law of compute; TopK lies below ReLU everywhere.",
    }
    return {
        "format_version": 1,
        "methods": [
            entry(
                "TopK dictionary",
                "inconclusive",
                **dense,
                arms=[
                    {
                        **arm("TopK + AuxK", "method", 0.741, half=None),
                        "figures": {f"another_long_figure_{i}": [0.25 * i] for i in range(8)},
                    },
                    arm("TopK", "baseline", 0.729, half=None),
                    arm("ReLU + L1", "baseline", 0.655, half=None),
                ],
                comparison="TopK + AuxK leads TopK by 0.012 with one seed, which gives no interval.",
                seeds=[0],
                quick=True,
                full_run=entry(
                    "TopK dictionary",
                    "shown",
                    **dense,
                    arms=[
                        arm("TopK + AuxK", "method", 0.763, 0.766, 0.761, 0.768, 0.764, half=0.0034),
                        arm("TopK", "baseline", 0.742, 0.749, 0.744, 0.739, 0.747, half=0.0049),
                        arm("ReLU + L1", "baseline", 0.66, 0.672, 0.655, 0.668, 0.661, half=0.0082),
                    ],
                    comparison="TopK + AuxK leads TopK by 0.020 (0.014 to 0.026, paired over 5 seeds).",
                    seeds=[0, 1, 2, 3, 4],
                    quick=False,
                ),
            ),
            entry(
                "Star-shaped sampler",
                "not shown",
                claim="Revisiting positions lowers the generative perplexity at equal steps.",
                metric="generative perplexity",
                paper_figure="26.4 against 31.1 on OpenWebText with 128 steps.",
                arms=[
                    arm("star-shaped", "method", 31.2, 30.4, 32.1, half=2.1),
                    arm("ancestral", "baseline", 30.9, 31.4, 30.2, half=1.5),
                ],
                comparison="The intervals overlap: −0.4 (−2.9 to 2.1).",
                seeds=[0, 1, 2],
                quick=False,
                higher_is_better=False,
            ),
            entry(
                "Steering vectors",
                "inconclusive",
                claim="One vector a layer matches LoRA with a tenth of a percent of its parameters.",
                metric="solved problems, %",
                paper_figure="71.2 against 72.0 (LoRA).",
                arms=[
                    arm("steering", "method", 61.5, 60.25, half=4.4),
                    {
                        **arm("LoRA", "baseline", 1.0, half=None),
                        "values": [],
                        "mean": None,
                        "error": "RuntimeError: the loss is NaN at step 12 <b>of 300</b>\n  in seed 0",
                    },
                ],
                comparison="The baseline failed, so nothing can be compared.",
                seeds=[0, 1],
                quick=False,
            ),
        ],
    }
