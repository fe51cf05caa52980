"""What KronSAE's paper says of its latents, on activations whose features are known: absorption, heads, correlations.

    absorption     16 parents with 4 children each, F = 128, K = 6: how much less of the parent's tokens its latent
                   finds where a child is on, and the explained variance that it goes with
    heads          compositional activations, F = 512, K = 10, heads (4, 8): mean correlation of latents of one head,
                   beside latents of different heads
    correlations   256 features with block covariance, superposed in 64 dimensions, F = 256, K = 8: the RV coefficient
                   of matched latents, beside that of TopK, and of random latents, which is its floor

Means over seeds 0, 1 and 2; each dictionary sees 800 batches of 256.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, cpu_seconds, print_table, write_rows
from trimtab.gallery.testbeds.sparse_codes import Compositional, Correlated, Hierarchy, superposition
from trimtab.sae import DictionaryConfig, KronSAE, TensorShards, TopKSAE, TrainingConfig, train
from trimtab.sae.absorption import absorption
from trimtab.sae.correlation_recovery import correlation_recovery
from trimtab.sae.kron_latents import head_correlation
from trimtab.sae.metrics import reconstruction

__all__ = ["main"]

SEEDS = (0, 1, 2)
STEPS, BATCH = 800, 256
RATE = 4e-3


def main() -> None:
    """Train everything, print the table, and write the rows."""
    rows = [*_absorption(), _heads(), *_correlations()]
    print_table("KronSAE's claims on known features, means over 3 seeds", rows)
    write_rows("kron_claims", rows)


def _train(rows: Tensor, seed: int, **dictionary: Any) -> TopKSAE:
    settings = TrainingConfig(
        tokens=STEPS * BATCH, batch_size=BATCH, learning_rate=RATE, seed=seed, checkpoint_every=10**6
    )
    config = DictionaryConfig(place="x", seed=seed, **dictionary)
    with tempfile.TemporaryDirectory() as out:
        return train([config], TensorShards({"x": rows}), settings, out)["x"]


def _absorption() -> list[Row]:
    start = time.perf_counter(), cpu_seconds()
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        bed = Hierarchy(seed=seed)
        rows, test = bed.sample(STEPS * BATCH // 4, seed=2 * seed), bed.sample(8192, seed=2 * seed + 1)
        for name, kron in (("TopK", None), ("(2, 2)", (2, 2)), ("(2, 4)", (2, 4)), ("(4, 4)", (4, 4))):
            sae = _train(rows.x, seed, n_latents=128, k=6, kron=kron)
            report = absorption(
                sae.encode_sparse(test.x),
                test.x,
                sae.decoder,
                parents=test.parents,
                children=test.children,
                directions=bed.directions()[:, 0],
            )
            explained = reconstruction(sae, test.x)["explained_variance"]
            found.setdefault(name, []).append((report.recall_drop.mean().item(), explained))
    peers = [statistics.fmean(column) for column in zip(*found.pop("TopK"), strict=True)]
    rows_: list[Row] = []
    for name, figures in found.items():
        ours = [statistics.fmean(column) for column in zip(*figures, strict=True)]
        for what, mine, peer in zip(("drop in recall", "explained variance"), ours, peers, strict=True):
            rows_.append(_row(f"absorption, KronSAE {name} beside TopK: {what}", mine, peer, start))
    return rows_


def _heads() -> Row:
    start = time.perf_counter(), cpu_seconds()
    found = []
    for seed in SEEDS:
        bed = Compositional(seed=seed)
        sae = _train(bed.sample(STEPS * BATCH // 4, seed=2 * seed), seed, n_latents=512, k=10, kron=(4, 8))
        assert isinstance(sae, KronSAE)
        found.append(head_correlation(sae, bed.sample(8192, seed=2 * seed + 1)))
    within, across = (statistics.fmean(column) for column in zip(*found, strict=True))
    return _row("correlation of latents within a head, beside across heads", within, across, start)


def _correlations() -> list[Row]:
    start = time.perf_counter(), cpu_seconds()
    found = []
    for seed in SEEDS:
        bed = Correlated(seed=seed)
        directions = superposition(bed, seed=1000 * seed)
        rows = bed.sample(STEPS * BATCH // 4, seed=seed) @ directions
        saes = (_train(rows, seed, n_latents=256, k=8, kron=kron) for kron in ((4, 8), None))
        decoders = [sae.decoder.detach() for sae in saes]
        decoders.append(torch.randn(256, 64, generator=torch.Generator().manual_seed(seed)))
        found.append([correlation_recovery(bed.covariance(), directions, decoder) for decoder in decoders])
    kron, topk, random = (statistics.fmean(column) for column in zip(*found, strict=True))
    return [
        _row("RV of KronSAE (4, 8) beside TopK", kron, topk, start),
        _row("RV of KronSAE (4, 8) beside random latents", kron, random, start),
    ]


def _row(name: str, ours: float, peer: float, start: tuple[float, float]) -> Row:
    """A figure; the times are those of its whole part until now."""
    return Row(
        name=name,
        unit="1",
        ours=ours,
        peer=peer,
        repeats=len(SEEDS),
        cpu_seconds=cpu_seconds() - start[1],
        wall_seconds=time.perf_counter() - start[0],
    )


if __name__ == "__main__":
    main()
