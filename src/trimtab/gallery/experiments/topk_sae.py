"""TopK dictionaries: does AuxK keep latents alive? On micro-llama's residual stream, beside no AuxK and a PCA."""

from __future__ import annotations

import functools
import tempfile

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.core.text import TextSource
from trimtab.gallery.experiment import Experiment
from trimtab.gallery.testbeds.micro import micro_model
from trimtab.gallery.testbeds.text import ENGLISH, ENGLISH_HELD_OUT
from trimtab.sae import DictionaryConfig, Harvest, HarvestConfig, TensorShards, TrainingConfig, train
from trimtab.sae.metrics import ReconstructionMeter

PLACE = "resid.2"
N_LATENTS = 2048
K = 16
TOKENS = 262_144


@functools.cache
def _activations() -> tuple[Tensor, Tensor]:
    """Rows of micro-llama on the package's English, for training and held out."""
    folder = micro_model("micro-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for file, tokens in ((ENGLISH, TOKENS // 2), (ENGLISH_HELD_OUT, 16_384)):
        config = HarvestConfig(context=128, sequences_per_forward=32, shard_tokens=tokens)
        rows.append(Harvest(model, tokenizer, TextSource(file), [PLACE], config).shard(0)[PLACE])
    return rows[0], rows[1]


def _measure(seed: int, *, alpha: float) -> dict[str, float]:
    rows, held_out = _activations()
    config = TrainingConfig(
        tokens=TOKENS,
        batch_size=512,
        learning_rate=4e-3,
        alpha=alpha,
        dead_after=16_384,
        seed=seed,
        checkpoint_every=10**6,
    )
    dictionary = DictionaryConfig(place=PLACE, n_latents=N_LATENTS, k=K, seed=seed)
    with tempfile.TemporaryDirectory() as out:
        sae = train([dictionary], TensorShards({PLACE: rows}), config, out)[PLACE]
    meter = ReconstructionMeter(held_out.shape[1], N_LATENTS)
    with torch.no_grad():
        latents = sae.encode_sparse(held_out)
        meter.update(held_out, sae.decode_sparse(latents), latents.indices[latents.values > 0])
    found = meter.results()
    return {"dead fraction": found["dead_fraction"], "explained variance": found["explained_variance"]}


def with_aux_k(seed: int) -> dict[str, float]:
    """TopK with AuxK at 1/32."""
    return _measure(seed, alpha=1 / 32)


def without_aux_k(seed: int) -> dict[str, float]:
    """TopK with the reconstruction loss alone."""
    return _measure(seed, alpha=0.0)


EXPERIMENT = Experiment(
    method="topk-sae",
    claim="The auxiliary loss AuxK leaves fewer latents dead than TopK training without it.",
    paper_figure="7 % of the latents dead with AuxK in a dictionary of 16 million (Gao et al. 2024, arXiv 2406.04093)",
    metric="dead fraction",
    higher_is_better=False,
    arms={"TopK + AuxK": ("method", with_aux_k), "TopK, no AuxK": ("baseline", without_aux_k)},
)
