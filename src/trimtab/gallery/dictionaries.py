"""From a trained dictionary to the page that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.core.errors import TrimtabError
from trimtab.gallery.dictionary_page import DictionaryPage
from trimtab.sae.explanations import LatentExplanation, explain
from trimtab.sae.harvest import Harvest
from trimtab.sae.metrics import Evaluation
from trimtab.sae.modeling import TopKSAE

__all__ = ["dictionary_page", "place_of", "read_history", "training_curves"]


def dictionary_page(
    sae: TopKSAE,
    harvest: Harvest,
    *,
    place: str,
    evaluation: Evaluation | None = None,
    curves: dict[str, list[list[float | int]]] | None = None,
    tokens: int = 131_072,
    n_latents: int = 2_000,
    contexts: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> DictionaryPage:
    """Explain up to `n_latents` latents of `sae`, which reads `place`, on about `tokens` tokens of the harvest."""
    read = 0

    def count(more: int) -> None:
        nonlocal read
        read += more
        advance(more)

    explanations, densities = explain(
        sae, harvest, place=place, tokens=tokens, n_latents=n_latents, contexts=contexts, advance=count
    )
    alive = int((densities > 0).sum())
    model = str(harvest.identity["model"])
    if len(explanations) < alive:
        selection = (
            f"{len(explanations):,} of the {alive:,} latents that fire on {read:,} tokens of {harvest.source.name}, "
            "evenly spaced in order of density"
        )
    else:
        selection = f"all {alive:,} latents that fire on {read:,} tokens of {harvest.source.name}"
    strings, latents = _packed(explanations, harvest.tokenizer)
    return DictionaryPage(
        title=f"{Path(model).name}, {place}",
        model=Path(model).name,
        place=place,
        n_latents=sae.config.n_latents,
        k=sae.config.k,
        d_in=sae.config.d_in,
        metrics=evaluation.summary() if evaluation is not None else {},
        curves=curves or {},
        densities=densities.tolist(),
        selection=selection,
        tokens=strings,
        latents=latents,
    )


def training_curves(history: list[dict[str, Any]], name: str) -> dict[str, list[list[float | int]]]:
    """Curves over tokens of dictionary `name` from the history of a run; none if the run is not its own."""
    rows = [(entry["tokens"], entry["dictionaries"][name]) for entry in history if name in entry["dictionaries"]]
    if not rows:
        return {}
    return {
        "explained variance (training batches)": [[tokens, 1 - row["loss"]] for tokens, row in rows],
        "dead fraction": [[tokens, row["dead_fraction"]] for tokens, row in rows],
    }


def place_of(sae: TopKSAE) -> tuple[str, str | None]:
    """The place that a dictionary reads, and the one that it writes if it is another."""
    metadata = sae.config.metadata
    ours = metadata.get("trimtab")
    if isinstance(ours, dict) and ours.keys() == {"stitched"}:  # its base was not ours
        ours = None
    match ours, str(metadata.get("hook_name")).split("."):
        case {"place": str(place), **rest}, _ if isinstance(target := rest.get("target"), str | None):
            return place, target
        case None, ["blocks", layer, hook] if hook in _HOOKS:
            return f"{_HOOKS[hook]}.{layer}", None
        case None, ["blocks", "0", "hook_resid_pre"]:
            return "embed", None
        case None, ["blocks", layer, "hook_resid_pre"] if layer.isdecimal():
            return f"resid.{int(layer) - 1}", None
    raise TrimtabError("the dictionary's cfg.json does not say which place of the model it reads")


_HOOKS = {"hook_resid_post": "resid", "hook_attn_out": "attn", "hook_mlp_out": "mlp"}


def _packed(explanations: list[LatentExplanation], tokenizer: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The table of token strings and the latents whose tokens are indices into it."""
    table: dict[str, int] = {}
    strings: dict[int, str] = {}

    def at(token: str) -> int:
        return table.setdefault(token, len(table))

    def text(token_id: int) -> str:
        if token_id not in strings:
            strings[token_id] = tokenizer.decode([token_id])
        return strings[token_id]

    latents = [
        {
            "id": e.latent,
            "density": e.density,
            "max_activation": e.max_activation,
            "promoted": [[at(token), round(logit, 3)] for token, logit in e.promoted],
            "suppressed": [[at(token), round(logit, 3)] for token, logit in e.suppressed],
            "contexts": [
                {
                    "tokens": [at(text(token_id)) for token_id in context.token_ids],
                    "activations": [float(f"{value:.4g}") for value in context.activations],
                }
                for context in e.contexts
            ],
        }
        for e in explanations
    ]
    return list(table), latents


def read_history(run: Path) -> list[dict[str, Any]]:
    """The history of the run in directory `run`; empty where there is none."""
    path = run / "history.json"
    if not path.exists():
        return []
    try:
        history: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TrimtabError(f"{str(path)!r} is damaged ({error}); delete it, and the page shows no curves") from error
    return history
