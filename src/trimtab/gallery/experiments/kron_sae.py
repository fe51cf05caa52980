"""KronSAE beside TopK at equal encoder FLOPs, on activations with compositional structure; activations ablated.

F = 2,048, K = 10, batches of 128. TopK takes 60 or 240 steps; at equal FLOPs KronSAE (4, 4), with half the encoder
rows, takes twice as many. The figure is the mean of the explained variance after both budgets. The learning rate of
each arm, budget and seed is the best of `RATES` on a validation set; the figures are those of a test set.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from trimtab.gallery.experiment import Experiment
from trimtab.gallery.testbeds.sparse_codes import Compositional
from trimtab.sae import DictionaryConfig, TensorShards, TopKSAE, TrainingConfig, train
from trimtab.sae.metrics import reconstruction

RATES = (4e-3, 8e-3, 1.6e-2, 3e-2)
N_LATENTS = 2048
K = 10
BATCH = 128
BASES = (60, 240)
"""TopK's steps."""
METRIC = "mean explained variance"


def _measure(seed: int, *, longer: float = 1.0, **dictionary: Any) -> dict[str, float]:
    """After each of `BASES`, `longer` times as many steps."""
    bed = Compositional(seed=seed)
    validation, test = (bed.sample(4096, seed=1000 * seed + part) for part in (1, 2))
    found: dict[str, float] = {}
    for base in BASES:
        steps = round(base * longer)
        rows = bed.sample(steps * BATCH, seed=1000 * seed)
        trained = [(rate, _train(rows, seed, rate, dictionary)) for rate in RATES]
        rate, sae = max(trained, key=lambda pair: reconstruction(pair[1], validation)["explained_variance"])
        measured = reconstruction(sae, test)
        found |= {
            f"steps, base {base}": float(steps),
            f"EV, base {base}": measured["explained_variance"],
            f"L0, base {base}": measured["l0"],
            f"dead fraction, base {base}": measured["dead_fraction"],
            f"learning rate, base {base}": rate,
        }
    mean = sum(found[f"EV, base {base}"] for base in BASES) / len(BASES)
    return {METRIC: mean, "encoder parameters": float(sae.encoder.numel()), **found}


def _train(rows: Any, seed: int, rate: float, dictionary: dict[str, Any]) -> TopKSAE:
    settings = TrainingConfig(
        tokens=len(rows),
        batch_size=BATCH,
        learning_rate=rate,
        dead_after=100 * BATCH,
        seed=seed,
        checkpoint_every=10**6,
    )
    config = DictionaryConfig(place="x", n_latents=N_LATENTS, k=K, seed=seed, **dictionary)
    with tempfile.TemporaryDirectory() as out:
        return train([config], TensorShards({"x": rows}), settings, out)["x"]


_KRON_4_8: dict[str, Any] = {"kron": (4, 8), "longer": 8 / 3}
_CUTS = (256, 512, 1024, 2048)

EXPERIMENT = Experiment(
    method="kron-sae",
    claim="At equal encoder FLOPs and a small budget KronSAE explains more variance than dense dictionaries.",
    paper_figure="on par with TopK under equal FLOPs; EV 0.814 against 0.809 at L0 = 32 (arXiv 2505.22255v3, table 6)",
    metric=METRIC,
    higher_is_better=True,
    arms={
        "KronSAE (4, 4), equal FLOPs": ("method", functools.partial(_measure, kron=(4, 4), longer=2.0)),
        "KronSAE (4, 8), equal FLOPs": ("method", functools.partial(_measure, **_KRON_4_8)),
        "KronSAE (4, 4), equal tokens": ("method", functools.partial(_measure, kron=(4, 4))),
        "relu(u) relu(v) in place of mAND (4, 8)": (
            "baseline",
            functools.partial(_measure, kron_activation="relu_product", **_KRON_4_8),
        ),
        "u v in place of mAND (4, 8)": (
            "baseline",
            functools.partial(_measure, kron_activation="product", **_KRON_4_8),
        ),
        "TopK": ("baseline", _measure),
        "Matryoshka TopK": ("baseline", functools.partial(_measure, objective="matryoshka", budgets=_CUTS)),
        "JumpReLU": ("baseline", functools.partial(_measure, sparsifier="jumprelu")),
    },
    seeds=(0, 1, 2),
)
