"""The three dictionary methods on Gemma 3 270M, layer 9: what they explain, beside TopK, on held-out text.

    hierarchical   one dictionary of up to 64 latents, read at 8, 16, 32 and 64, beside a TopK dictionary of each
    kron           KronSAE (4, 4) beside TopK at equal encoder FLOPs (twice the tokens) and at equal tokens, k = 32
    boost          a Shakespeare dictionary (BatchTopK, 32) and 256 latents (5) of movie reviews, with 10 % replay

F = 4,096, batches of 1,024, attention sinks dropped; 229,376 tokens of Shakespeare (half of them where the other arm
has twice as many), 98,304 of reviews: far below the papers' hundreds of millions. Takes a quarter of an hour, and so is
not part of `make bench`.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, cpu_seconds, print_table, write_rows
from benchmarks.sae_training import PLACE
from trimtab.core.text import TextSource
from trimtab.gallery.testbeds.real_models import cache_dir, gemma3_270m, movie_reviews, shakespeare_text
from trimtab.sae import (
    BoostedSAE,
    DictionaryConfig,
    Harvest,
    JumpReLUSAE,
    Mixture,
    TensorShards,
    TopKSAE,
    TrainingConfig,
    ev_curve,
    train,
)
from trimtab.sae.harvest import ShardCache
from trimtab.sae.metrics import evaluate, reconstruction

__all__ = ["main"]

BATCH, TOKENS, DOMAIN_TOKENS, HELD_OUT, CE_TOKENS = 1_024, 229_376, 98_304, 16_384, 4_096
BUDGETS = (8, 16, 32, 64)


def main() -> None:
    """Train everything, print the table, and write the rows."""
    reviews = [line.split("\t")[-1] for line in movie_reviews().read_text("utf-8").splitlines()]
    works = shakespeare_text().read_text("utf-8")
    domain, general = _rows("reviews", reviews, 4), _rows("shakespeare", shakespeare_text(), 8)
    # What is far behind the tokens that are harvested.
    held_out = {"reviews": _live(reviews[-1000:]), "Shakespeare": _live([works[-100_000:]])}
    rows = [*_hierarchical(*general), *_kron(*general), *_boost(general, domain, held_out)]
    print_table("Dictionaries of Gemma 3 270M, layer 9, F = 4,096: explained variance of held-out text, and loss", rows)
    write_rows("gemma_dictionaries", rows)


@functools.cache
def _model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gemma3_270m()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _live(text: Any) -> Harvest:
    return Harvest(*_model(), TextSource(text), [PLACE])


def _rows(name: str, text: Any, shards: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations to train on and held out, from the cache or harvested into it."""
    live = _live(text)
    cache = ShardCache(
        live, cache_dir() / "benchmarks" / f"gemma-dictionaries-{name}-{live.identity['text_sha256'][:12]}"
    )
    found = torch.cat([cache.shard(index)[PLACE].float() for index in range(shards)])
    return found[:-HELD_OUT], found[-HELD_OUT:]


def _train(source: Any, dictionaries: list[DictionaryConfig], tokens: int) -> list[TopKSAE]:
    settings = TrainingConfig(tokens=tokens, batch_size=BATCH, learning_rate=4e-3, checkpoint_every=10**6)
    with tempfile.TemporaryDirectory() as out:
        return list(train(dictionaries, source, settings, out).values())


def _dictionary(**options: Any) -> DictionaryConfig:
    return DictionaryConfig(**({"place": PLACE, "n_latents": 4_096} | options))


def _hierarchical(rows: torch.Tensor, held_out: torch.Tensor) -> list[Row]:
    start = time.perf_counter(), cpu_seconds()
    dictionaries = [_dictionary(k=64, objective="hierarchical"), *(_dictionary(k=k) for k in BUDGETS)]
    one, *dedicated = _train(TensorShards({PLACE: rows}), dictionaries, TOKENS)
    curve = ev_curve(one, held_out, BUDGETS)
    largest = ev_curve(dedicated[-1], held_out, BUDGETS)
    found = []
    for k, sae in zip(BUDGETS, dedicated, strict=True):
        own = reconstruction(sae, held_out)["explained_variance"]
        found.append(_row(f"hierarchical at {k} beside TopK {k}", curve[k], own, start))
    return found + [
        _row(f"hierarchical at {k} beside TopK 64 cut to {k}", curve[k], largest[k], start) for k in BUDGETS
    ]


def _kron(rows: torch.Tensor, held_out: torch.Tensor) -> list[Row]:
    start = time.perf_counter(), cpu_seconds()
    source, half = TensorShards({PLACE: rows}), TOKENS // 2
    (kron,) = _train(source, [_dictionary(k=32, kron=(4, 4))], TOKENS)
    equal, dense = _train(source, [_dictionary(k=32, kron=(4, 4)), _dictionary(k=32)], half)
    ours, few, peer = (reconstruction(sae, held_out)["explained_variance"] for sae in (kron, equal, dense))
    return [
        _row("KronSAE (4, 4) beside TopK at equal encoder FLOPs", ours, peer, start),
        _row("KronSAE (4, 4) beside TopK at equal tokens", few, peer, start),
    ]


def _boost(
    general: tuple[torch.Tensor, torch.Tensor],
    domain: tuple[torch.Tensor, torch.Tensor],
    texts: dict[str, Harvest],
) -> list[Row]:
    start = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as directory:
        (base,) = _train(TensorShards({PLACE: general[0]}), [_dictionary(k=32, sparsifier="batch_topk")], TOKENS)
        base.save_pretrained(directory)
        addition = _dictionary(n_latents=256, k=5, base=str(Path(directory)))
        source = TensorShards({PLACE: domain[0][:DOMAIN_TOKENS]})
        mixed = Mixture(source, TensorShards({PLACE: general[0]}), 0.1)
        found = []
        for name, each in (("", source), (", 10 % replay", mixed)):
            (residual,) = _train(each, [addition], DOMAIN_TOKENS)
            assert isinstance(residual, JumpReLUSAE)
            boosted = BoostedSAE(base, {"reviews": residual})
            for text, held_out in (("reviews", domain[1]), ("Shakespeare", general[1])):
                figures = [reconstruction(sae, held_out)["explained_variance"] for sae in (boosted, base)]
                found.append(_row(f"boosted{name}, on {text}, beside the base", *figures, start))
                losses = [_loss_increase(sae, texts[text]) for sae in (boosted, base)]
                found.append(_row(f"boosted{name}, on {text}: loss increase", *losses, start, unit="nats a token"))
    return found


def _loss_increase(sae: TopKSAE | BoostedSAE, text: Harvest) -> float:
    """Of the language model with the reconstruction spliced in."""
    measured = evaluate(sae, text, place=PLACE, tokens=CE_TOKENS, ce_tokens=CE_TOKENS)
    assert measured.ce_spliced is not None
    assert measured.ce_clean is not None
    return measured.ce_spliced - measured.ce_clean


def _row(name: str, ours: float, peer: float, start: tuple[float, float], unit: str = "1") -> Row:
    """A figure; the times are those of its whole part until now."""
    return Row(
        name=name,
        unit=unit,
        ours=ours,
        peer=peer,
        repeats=1,
        cpu_seconds=cpu_seconds() - start[1],
        wall_seconds=time.perf_counter() - start[0],
    )


if __name__ == "__main__":
    main()
