"""Sparse dictionaries of a model's activations: harvest, train, measure, explain, exchange.

    harvest = Harvest(model, tokenizer, TextSource("text.txt"), ["resid.9"])
    dictionary = DictionaryConfig(place="resid.9", n_latents=4096, k=32)
    saes = train([dictionary], harvest, TrainingConfig(tokens=300_000), "runs/a")
    evaluate(saes["resid.9"], harvest, place="resid.9")

`functional` holds the formulas on tensors, `modeling` the module, `formats` the files that SAELens and sparsify read.
"""

from trimtab.sae.boosted import BoostedSAE
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.explanations import explain
from trimtab.sae.harvest import Harvest, HarvestConfig, ShardCache, TensorShards
from trimtab.sae.judging import score_latents
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.kron_latents import kron_statistics, pre_latent_dictionary
from trimtab.sae.metrics import ev_curve, evaluate, splice
from trimtab.sae.mixture import Mixture
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig
from trimtab.sae.objectives import hierarchical_topk_loss
from trimtab.sae.saebench import SAEBenchSAE
from trimtab.sae.trainer import train

__all__ = [
    "BoostedSAE",
    "DictionaryConfig",
    "Harvest",
    "HarvestConfig",
    "JumpReLUSAE",
    "JumpReLUSAEConfig",
    "KronSAE",
    "KronSAEConfig",
    "Mixture",
    "SAEBenchSAE",
    "ShardCache",
    "TensorShards",
    "TopKSAE",
    "TopKSAEConfig",
    "TrainingConfig",
    "ev_curve",
    "evaluate",
    "explain",
    "hierarchical_topk_loss",
    "kron_statistics",
    "pre_latent_dictionary",
    "score_latents",
    "splice",
    "train",
]
