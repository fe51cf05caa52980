"""What a training run of dictionaries is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.extended import ExtendInit
from trimtab.sae.jumprelu import EncoderInput
from trimtab.sae.kernels import Precision
from trimtab.sae.objectives import (
    RECONSTRUCTION,
    Hierarchical,
    Matryoshka,
    MultiTopK,
    Objective,
    hierarchical_weights,
)
from trimtab.sae.selection import Sparsifier

__all__ = ["DictionaryConfig", "ObjectiveName", "TrainingConfig"]

ACTIVATIONS = ("mand", "relu_product", "product")
ObjectiveName = Literal["reconstruction", "hierarchical", "multi_topk", "matryoshka"]


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """One dictionary of a run.

    Args:
        place: the activation that it reads, such as "resid.9"
        n_latents: size of the dictionary
        k: latents that a token may use; with batch_topk and jumprelu, on average
        target: the activation that it writes; None for `place` itself, another place makes a transcoder
        kron: m and n of a KronSAE, whose heads have m x n latents; None for a dense encoder
        kron_activation: mand, or one of the paper's ablations: relu_product, product
        kron_mask_inactive: silent latents are 0, as in the paper's equation; False: sqrt(eps), as in its listing
        objective: what it is trained for: reconstruction from its k latents; hierarchical, from every number of them up
            to k; multi_topk, from k and from 4 k; matryoshka, from the first latents of the dictionary
        budgets: hierarchical: the numbers of latents, None for all of 1 … k; matryoshka: lengths of the prefixes, the
            last of them n_latents
        budget_weights: hierarchical: a weight for each of `budgets`; None for equal ones
        sparsifier: topk; batch_topk: k latents on average over a batch, and one threshold at inference; jumprelu:
            thresholds of each latent's own, trained towards a mean of k
        base: directory of a finished dictionary of `place`: what it leaves over is learned (SAE Boost, batch_topk)
        encoder_input: with base, what the encoder reads: the input x, as the paper has it, or the error x - base(x),
            which is small wherever the base is good; such a one cannot be stitched to its base
        start: directory of a finished dictionary of this shape, whose weights are the initial ones: fine-tuning
        extend: directory of a finished dictionary of `place`, whose latents are the first of this one and stay as they
            are; n_latents and k count old and new ones together
        extend_init: with extend, how new latents begin: random, or as copies of the most_active old ones
        freeze_decoder: keep the decoder's first rows, random ones unless start gives others: the control for
            what a random direction already explains
        seed: of its initial weights
    """

    place: str
    n_latents: int
    k: int
    target: str | None = None
    kron: tuple[int, int] | None = None
    kron_activation: Literal["mand", "relu_product", "product"] = "mand"
    kron_mask_inactive: bool = True
    objective: ObjectiveName = "reconstruction"
    budgets: tuple[int, ...] | None = None
    budget_weights: tuple[float, ...] | None = None
    sparsifier: Sparsifier = "topk"
    base: str | None = None
    encoder_input: EncoderInput = "input"
    start: str | None = None
    extend: str | None = None
    extend_init: ExtendInit = "random"
    freeze_decoder: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integers(self, "n_latents", "k", least=1)
        _check_integers(self, "seed", least=0)
        if not 1 <= self.k <= self.n_latents:
            raise TrimtabError(f"k={self.k} must lie between 1 and n_latents={self.n_latents}")
        if self.target == self.place:
            raise TrimtabError(f"target={self.target!r} is the place itself; leave target out for an autoencoder")
        if self.kron is not None and (
            len(self.kron) != 2 or min(self.kron) < 1 or self.n_latents % (self.kron[0] * self.kron[1])
        ):
            raise TrimtabError(
                f"kron={self.kron}; accepted: positive m and n with n_latents={self.n_latents} a multiple of m x n"
            )
        if self.sparsifier not in get_args(Sparsifier):
            raise unknown("sparsifier", self.sparsifier, get_args(Sparsifier))
        if self.sparsifier == "jumprelu" and (
            self.kron or self.base or self.extend or self.objective != "reconstruction"
        ):
            raise TrimtabError(
                "jumprelu has no meaning with kron, base, extend, or another objective than reconstruction: its "
                "thresholds are trained for all latents of a dense encoder at once"
            )
        if self.base is not None and (self.target is not None or self.kron is not None):
            raise TrimtabError(f"base={self.base!r}: what it leaves over is learned by dense autoencoders only")
        if self.encoder_input not in get_args(EncoderInput):
            raise unknown("encoder_input", self.encoder_input, get_args(EncoderInput))
        if self.encoder_input == "error" and self.base is None:
            raise TrimtabError(f"encoder_input={self.encoder_input!r} needs base: the error is what a base leaves over")
        if self.kron_activation not in ACTIVATIONS:
            raise unknown("kron_activation", self.kron_activation, ACTIVATIONS)
        if not self.kron_mask_inactive and (self.kron is None or self.kron_activation != "mand"):
            raise TrimtabError(
                "kron_mask_inactive=False is for a KronSAE with kron_activation='mand': the authors' listing"
            )
        if self.start is not None and (self.base is not None or self.kron is not None):
            raise TrimtabError(f"start={self.start!r} has no meaning with base or kron: it is for dense dictionaries")
        if self.extend is not None and (self.start or self.base or self.kron or self.target):
            raise TrimtabError(
                f"extend={self.extend!r} has no meaning with start, base, kron or target: it is for dense autoencoders"
            )
        if self.extend_init not in get_args(ExtendInit):
            raise unknown("extend_init", self.extend_init, get_args(ExtendInit))
        if self.extend is None and self.extend_init != "random":
            raise TrimtabError(f"extend_init={self.extend_init!r} needs extend: it copies latents of that dictionary")
        if self.selection == "batch_topk" and (
            self.kron is not None or self.objective in ("hierarchical", "multi_topk")
        ):
            raise TrimtabError(
                f"batch_topk has no meaning for kron={self.kron}, objective={self.objective!r}: a threshold "
                "needs a dense encoder, a prefix by value a number of latents for each token"
            )
        self._check_objective()

    @property
    def selection(self) -> Sparsifier:
        """How latents are selected in training: over a batch where it adds to a base."""
        return "batch_topk" if self.base is not None else self.sparsifier

    def _check_objective(self) -> None:
        if self.objective not in get_args(ObjectiveName):
            raise unknown("objective", self.objective, get_args(ObjectiveName))
        for name in ("budgets", "budget_weights"):
            accepted = ("hierarchical", "matryoshka") if name == "budgets" else ("hierarchical",)
            if getattr(self, name) is not None and self.objective not in accepted:
                raise TrimtabError(f"{name}={getattr(self, name)} has no meaning for objective={self.objective!r}")
        if self.objective == "multi_topk" and 4 * self.k > self.n_latents:
            raise TrimtabError(f"k={self.k}: multi_topk selects 4 k latents, more than n_latents={self.n_latents}")
        if self.objective == "hierarchical":
            hierarchical_weights(self.k, self.budgets, self.budget_weights)
        if self.objective == "matryoshka":
            head = self.kron[0] * self.kron[1] if self.kron else 1
            cuts = self.budgets or ()
            if (
                sorted({0, *cuts}) != [0, *cuts]
                or not cuts
                or cuts[-1] != self.n_latents
                or any(c % head for c in cuts)
            ):
                raise TrimtabError(
                    f"budgets={self.budgets}; accepted for matryoshka: rising lengths that end in "
                    f"n_latents={self.n_latents}" + (f", multiples of m n = {head}" if self.kron else "")
                )

    @property
    def training_objective(self) -> Objective:
        """The objective, on tensors."""
        match self.objective:
            case "hierarchical":
                return Hierarchical(self.budgets, self.budget_weights)
            case "multi_topk":
                return MultiTopK()
            case "matryoshka":
                return Matryoshka(self.budgets or ())
        return RECONSTRUCTION

    @property
    def places(self) -> tuple[str, ...]:
        """The activations that it needs."""
        return (self.place,) if self.target is None else (self.place, self.target)

    @property
    def output(self) -> str:
        """The activation that it writes."""
        return self.target or self.place


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How dictionaries are trained: the recipe of Gao et al. (2024), with the schedule of KronSAE, section 2.6.

    Activations are scaled to a mean square of 1 per feature about their mean, which is where the decoder's bias
    starts; the scale is folded into the weights at the end. Learning rates hold in those units.

    Args:
        tokens: activations that each dictionary sees; a last incomplete batch is left out
        batch_size: activations of one step, over all processes
        learning_rate: peak of AdamW (betas 0.9 and 0.999, no weight decay)
        warmup: share of the steps in which the rate rises, before its cosine
        final_learning_rate: where the cosine ends
        alpha: weight of AuxK, 0 for none
        k_aux: dead latents that AuxK uses for a token; None for the power of two nearest to half the width
        aux_share: share of a batch's tokens on which AuxK is estimated (all of them in Gao et al.): dead latents get
            many more of its gradients than live ones of the main loss, and half of them cost half
        dead_after: tokens without firing that make a latent dead; None for a tenth of `tokens`
        apply_b_dec_to_input: subtract the decoder's bias from the input (never for a transcoder); None: as the
            architecture's paper does, with a dense encoder but not with a KronSAE's
        unit_norm_decoder: keep decoder rows at norm 1, and take the parallel part out of their gradient
        grad_clip: largest norm of a dictionary's gradient; None for no clipping
        precision: of the encoder's product: float32, screened (bfloat16 proposes, float32 decides) or bfloat16
        tensor_parallel: processes that hold each dictionary together, each a part of its latents; a divisor of their
            number
        seed: of the order of activations
        checkpoint_every: steps between checkpoints
        keep_last: checkpoints that stay
        log_every: steps between entries of the history
        report_to: trackers that accelerate knows, such as "tensorboard"
    """

    tokens: int
    batch_size: int = 2048
    learning_rate: float = 8e-4
    warmup: float = 0.1
    final_learning_rate: float = 1e-6
    alpha: float = 1 / 32
    k_aux: int | None = None
    aux_share: float = 0.5
    dead_after: int | None = None
    apply_b_dec_to_input: bool | None = None
    unit_norm_decoder: bool = True
    grad_clip: float | None = 1.0
    precision: Precision = "float32"
    tensor_parallel: int = 1
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("tokens", "batch_size", "tensor_parallel", "checkpoint_every", "keep_last", "log_every")
        optional = [name for name in ("k_aux", "dead_after") if getattr(self, name) is not None]
        _check_integers(self, *counts, *optional, least=1)
        _check_integers(self, "seed", least=0)
        if not isinstance(self.unit_norm_decoder, bool):
            raise TrimtabError(f"unit_norm_decoder={self.unit_norm_decoder!r}; accepted: True, False")
        if isinstance(self.report_to, str):
            raise TrimtabError(f"report_to={self.report_to!r}; accepted: a tuple of names")
        for name in ("learning_rate", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise TrimtabError(f"{name}={getattr(self, name)!r} must be finite")
        if self.tokens < self.batch_size:
            raise TrimtabError(f"tokens={self.tokens} is less than one batch of batch_size={self.batch_size}")
        if not self.learning_rate > 0:
            raise TrimtabError(f"learning_rate={self.learning_rate!r} must be positive")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise TrimtabError(f"final_learning_rate={self.final_learning_rate!r} must lie between 0 and learning_rate")
        if not 0 <= self.warmup <= 1:
            raise TrimtabError(f"warmup={self.warmup!r} must lie between 0 and 1")
        if not 0 < self.aux_share <= 1:
            raise TrimtabError(f"aux_share={self.aux_share!r} must lie above 0 and at most at 1")
        if not self.alpha >= 0:
            raise TrimtabError(f"alpha={self.alpha!r} must be 0 or above")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise TrimtabError(f"grad_clip={self.grad_clip!r} must be positive, or None")
        if self.precision not in ("float32", "screened", "bfloat16"):
            raise unknown("precision", self.precision, ("float32", "screened", "bfloat16"))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.batch_size

    @property
    def dead_after_tokens(self) -> int:
        """`dead_after`, or its default."""
        return self.dead_after if self.dead_after is not None else max(1, self.tokens // 10)


def _check_integers(config: object, *names: str, least: int) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TrimtabError(f"{name}={value!r} must be a whole number of at least {least}")
