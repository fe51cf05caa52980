"""HierarchicalTopK beside TopK dictionaries of several budgets, each read at all of them, on a skewed sparse code.

F = 512, up to 32 latents a token, 1,200 steps of 256. The metric is the mean explained variance over 1, 2, 4, … 32
latents, the first j in order of value.
"""

from __future__ import annotations

import functools
import tempfile
import warnings

from trimtab.gallery.experiment import Experiment
from trimtab.gallery.testbeds.sparse_codes import Skewed
from trimtab.sae import DictionaryConfig, TensorShards, TrainingConfig, train
from trimtab.sae.metrics import reconstruction

BUDGETS = (1, 2, 4, 8, 16, 32)
METRIC = "mean explained variance"
STEPS, BATCH = 1200, 256


def _measure(seed: int, *, k: int, **options: object) -> dict[str, float]:
    bed = Skewed(seed=seed)
    rows, held_out = bed.sample(STEPS * BATCH // 4, seed=1000 * seed), bed.sample(4096, seed=1000 * seed + 1)
    settings = TrainingConfig(
        tokens=STEPS * BATCH,
        batch_size=BATCH,
        learning_rate=3e-3,
        dead_after=100 * BATCH,
        seed=seed,
        checkpoint_every=10**6,
    )
    dictionary = DictionaryConfig(place="x", n_latents=512, k=k, seed=seed, **options)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as out:
        sae = train([dictionary], TensorShards({"x": rows}), settings, out)["x"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "k=.* is more than the k", UserWarning)  # which is what is compared
        curve = {j: reconstruction(sae, held_out, j)["explained_variance"] for j in BUDGETS}
    figures = {f"EV at {j}": value for j, value in curve.items()}
    dead = reconstruction(sae, held_out)["dead_fraction"]
    return {METRIC: sum(curve.values()) / len(curve), "dead fraction": dead, **figures}


EXPERIMENT = Experiment(
    method="hierarchical-topk",
    claim="One HierarchicalTopK dictionary explains more variance over all budgets than a TopK dictionary of any one.",
    paper_figure="one dictionary at or above the front of TopK and BatchTopK for every L0 up to 128 (arXiv 2505.24473)",
    metric=METRIC,
    higher_is_better=True,
    arms={
        "HierarchicalTopK, every prefix": ("method", functools.partial(_measure, k=32, objective="hierarchical")),
        "HierarchicalTopK, prefixes 1, 2, 4 … 32": (
            "method",
            functools.partial(_measure, k=32, objective="hierarchical", budgets=BUDGETS),
        ),
        "TopK 32": ("baseline", functools.partial(_measure, k=32)),
        "TopK 16": ("baseline", functools.partial(_measure, k=16)),
        "TopK 8": ("baseline", functools.partial(_measure, k=8)),
        "TopK 4": ("baseline", functools.partial(_measure, k=4)),
        "BatchTopK 32": ("baseline", functools.partial(_measure, k=32, sparsifier="batch_topk")),
        "Multi-TopK 8 and 32": ("baseline", functools.partial(_measure, k=8, objective="multi_topk")),
        "Matryoshka 32": (
            "baseline",
            functools.partial(_measure, k=32, objective="matryoshka", budgets=(32, 64, 128, 256, 512)),
        ),
    },
    seeds=(0, 1, 2),
)
