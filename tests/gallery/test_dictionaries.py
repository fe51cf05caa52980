"""From a dictionary to its page: what the page says is what `explain` found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.gallery.dictionaries import dictionary_page, place_of, read_history, training_curves
from trimtab.gallery.dictionary_page import DictionaryPage
from trimtab.gallery.report import render
from trimtab.sae.explanations import explain
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.metrics import evaluate
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

HISTORY = [
    {"step": step, "tokens": 100 * step, "dictionaries": {"resid.1": {"loss": 1 / step, "dead_fraction": 0.25}}}
    for step in (1, 2, 4)
]


def sae_with(metadata: dict[str, Any]) -> TopKSAE:
    return TopKSAE(TopKSAEConfig(d_in=32, n_latents=24, k=3, metadata=metadata), seed=3)


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., Harvest]:
    words = [f"w{(7 * i) % 60}" for i in range(500)]
    config = HarvestConfig(context=16, sequences_per_forward=4, sink_norm_ratio=None)
    source = TextSource([" ".join(words[i : i + 20]) for i in range(0, 500, 20)])
    return Harvest(tiny_llama, tiny_tokenizer, source, ["resid.1"], config)


def test_the_page_holds_what_explain_found(harvest: Harvest, tiny_tokenizer: Any) -> None:
    sae = sae_with({})
    page = dictionary_page(sae, harvest, place="resid.1", contexts=3)
    found, densities = explain(sae, harvest, place="resid.1", contexts=3)
    assert (page.place, page.n_latents, page.k, page.d_in) == ("resid.1", 24, 3, 32)
    assert page.title == "LlamaForCausalLM, resid.1"
    assert list(page.densities) == densities.tolist()
    assert [latent["id"] for latent in page.latents] == [e.latent for e in found]
    for latent, e in zip(page.latents, found, strict=True):
        assert (latent["density"], latent["max_activation"]) == (e.density, e.max_activation)
        for context, expected in zip(latent["contexts"], e.contexts, strict=True):
            assert [page.tokens[i] for i in context["tokens"]] == [
                tiny_tokenizer.decode([t]) for t in expected.token_ids
            ]
            assert context["activations"] == pytest.approx(expected.activations, rel=1e-3)
        for name, pairs in (("promoted", e.promoted), ("suppressed", e.suppressed)):
            assert [page.tokens[i] for i, _ in latent[name]] == [token for token, _ in pairs]
            assert [logit for _, logit in latent[name]] == pytest.approx([logit for _, logit in pairs], abs=1e-3)


def test_the_selection_states_how_many_of_how_many_on_the_tokens_that_were_read(harvest: Harvest) -> None:
    told: list[int] = []
    whole = dictionary_page(sae_with({}), harvest, place="resid.1", tokens=100_000, advance=told.append)
    read = sum(forward.input_ids.numel() for forward in harvest.forwards())
    alive = len(whole.latents)
    assert sum(told) == read
    assert 5 < alive <= 24
    assert whole.selection == f"all {alive} latents that fire on {read} tokens of list"
    some = dictionary_page(sae_with({}), harvest, place="resid.1", tokens=64, n_latents=4)
    assert len(some.latents) == 4
    assert some.selection.startswith("4 of the ")
    assert some.selection.endswith(" latents that fire on 64 tokens of list, evenly spaced in order of density")


def test_the_page_survives_json_and_is_rendered(harvest: Harvest, tmp_path: Path) -> None:
    sae = sae_with({})
    evaluation = evaluate(sae, harvest, place="resid.1")
    curves = training_curves(HISTORY, "resid.1")
    page = dictionary_page(sae, harvest, place="resid.1", evaluation=evaluation, curves=curves)
    assert page.metrics == evaluation.summary()
    assert DictionaryPage.from_json(page.to_json()) == page
    html = render(tmp_path / "report.html", title="A dictionary", results=None, dictionaries=[page]).read_text("utf-8")
    assert "A dictionary" in html
    assert "LlamaForCausalLM, resid.1" in html
    assert page.selection in html
    assert "Explained variance" in html


def test_a_dictionary_that_never_fires_has_a_page_too(harvest: Harvest, tmp_path: Path) -> None:
    sae = sae_with({})
    sae.encoder_bias.data.fill_(-1e6)
    page = dictionary_page(sae, harvest, place="resid.1")
    assert page.latents == []
    assert page.selection.startswith("all 0 latents")
    assert render(tmp_path / "report.html", title="t", results=None, dictionaries=[page]).exists()


# -- curves ----------------------------------------------------------------------------------------


def test_curves_come_from_the_history_of_the_dictionary_itself() -> None:
    curves = training_curves(HISTORY, "resid.1")
    assert curves["explained variance (training batches)"] == [[100, 0.0], [200, 0.5], [400, 0.75]]
    assert curves["dead fraction"] == [[100, 0.25], [200, 0.25], [400, 0.25]]
    assert training_curves(HISTORY, "resid.2") == {}
    assert training_curves([], "resid.1") == {}


def test_a_run_without_history_has_none(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    assert read_history(tmp_path) == HISTORY


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"trimtab": {"place": "resid.3", "target": None}}, ("resid.3", None)),
        ({"trimtab": {"place": "resid.3"}}, ("resid.3", None)),
        ({"trimtab": {"place": "resid.3", "target": "mlp.4"}}, ("resid.3", "mlp.4")),
        ({"hook_name": "blocks.9.hook_resid_post"}, ("resid.9", None)),
        ({"hook_name": "blocks.0.hook_attn_out"}, ("attn.0", None)),
        ({"hook_name": "blocks.12.hook_mlp_out"}, ("mlp.12", None)),
        ({"hook_name": "blocks.3.hook_resid_pre"}, ("resid.2", None)),
        ({"hook_name": "blocks.0.hook_resid_pre"}, ("embed", None)),
        ({"hook_name": "blocks.9.hook_resid_post", "trimtab": {"stitched": {}}}, ("resid.9", None)),
    ],
)
def test_the_place_is_that_of_the_metadata(metadata: dict[str, Any], expected: tuple[str, str | None]) -> None:
    assert place_of(sae_with(metadata)) == expected


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"hook_name": "blocks.9.hook_q"},
        {"hook_name": "blocks.x.hook_resid_pre"},
        {"hook_name": 3},
        {"trimtab": 5},
        {"trimtab": ["place"]},
        {"trimtab": "place"},
        {"trimtab": {"place": 5}},
        {"trimtab": {"place": "resid.1", "target": ["x"]}},
        {"trimtab": {"target": "mlp.1"}, "hook_name": "blocks.9.hook_resid_post"},
    ],
)
def test_metadata_that_names_no_place_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(TrimtabError, match=r"cfg\.json does not say which place"):
        place_of(sae_with(metadata))
