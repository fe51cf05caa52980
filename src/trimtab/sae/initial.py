"""The dictionary that a training begins with: its shape, and where its weights come from.

A fresh one has random weights (`TopKSAE`, `KronSAE`); `start` gives it those of a finished one, which is fine-tuned
then; `extend` those of a finished one for its first latents (`trimtab.sae.extended`). What is finished comes from a
directory, is checked, and is turned into the scaled units of training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.activations import tl_hook_name
from trimtab.core.errors import TrimtabError
from trimtab.sae.boosted import canonical_hook
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.extended import extend_weights
from trimtab.sae.jumprelu import JumpReLUSAE
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["extended", "fresh", "open_base", "shape_of", "started"]


def shape_of(config: DictionaryConfig, training: TrainingConfig, widths: tuple[int, int]) -> TopKSAEConfig:
    """The shape of the dictionary that `config` asks for, where it reads and writes activations of `widths`."""
    transcoder = config.target is not None
    subtract = training.apply_b_dec_to_input if training.apply_b_dec_to_input is not None else config.kron is None
    common: dict[str, Any] = {
        "d_in": widths[0],
        "d_out": widths[1],
        "k": config.k,
        "transcoder": transcoder,
        "apply_b_dec_to_input": subtract and not transcoder and config.base is None,
    }
    if config.kron is None:
        return TopKSAEConfig(n_latents=config.n_latents, **common)
    m, n = config.kron
    return KronSAEConfig(
        h=config.n_latents // (m * n),
        m=m,
        n=n,
        activation=config.kron_activation,
        mask_inactive=config.kron_mask_inactive,
        **common,
    )


def fresh(shape: TopKSAEConfig, seed: int = 0) -> TopKSAE:
    """A dictionary of this shape with its initial weights."""
    return KronSAE(shape, seed=seed) if isinstance(shape, KronSAEConfig) else TopKSAE(shape, seed=seed)


def open_base(config: DictionaryConfig) -> TopKSAE:
    """The frozen dictionary that `config` adds to or extends. Raises TrimtabError where it is of another place."""
    directory = config.base or config.extend
    assert directory is not None
    what = f"{'extend' if config.base is None else 'base'}={directory!r}"
    base = TopKSAE.from_pretrained(directory).requires_grad_(False)
    match base.config.metadata:
        case {"trimtab": {"place": str(place)}} if place != config.place:
            raise TrimtabError(f"{what} reads place {place!r}, this dictionary {config.place!r}")
        case {"hook_name": str(hook)} if canonical_hook(base.config.metadata) != _hook_of(config.place, hook):
            raise TrimtabError(f"{what} reads hook {hook!r}, this dictionary place {config.place!r}")
    if isinstance(base, JumpReLUSAE) and base.config.encoder_input == "error":
        raise TrimtabError(f"{what} reads the error of another dictionary; accepted: one that reads x")
    if base.config.transcoder:
        raise TrimtabError(f"{what} is a transcoder; accepted: an autoencoder")
    return base


@torch.no_grad()
def started(
    config: DictionaryConfig, shape: TopKSAEConfig, scales: tuple[float, float], input_mean: Tensor, unit_norm: bool
) -> TopKSAE:
    """The finished dictionary `config.start` in scaled units; with `unit_norm`, its decoder rows at norm 1."""
    assert config.start is not None
    found = TopKSAE.from_pretrained(config.start)
    _check_shape(found, shape, f"start={config.start!r}", "n_latents")
    if unit_norm:
        norms = found.decoder.norm(dim=-1)
        found.encoder.mul_(norms[:, None])
        found.encoder_bias.mul_(norms)
        found.decoder.div_(norms.where(norms > 0, 1.0)[:, None])
        if isinstance(found, JumpReLUSAE):
            found.threshold.mul_(norms)
    return _scaled(found, scales, input_mean)


@torch.no_grad()
def extended(
    config: DictionaryConfig,
    shape: TopKSAEConfig,
    old: TopKSAE,
    scales: tuple[float, float],
    input_mean: Tensor,
    source: Float[Tensor, "tokens d_in"],
) -> TopKSAE:
    """The latents of `old` in scaled units, and new ones after them; `source` is what is read, in scaled units."""
    _check_shape(old, shape, f"extend={config.extend!r}")
    if not old.config.n_latents < config.n_latents:
        raise TrimtabError(f"n_latents={config.n_latents} must be more than the {old.config.n_latents} to extend")
    first = _scaled(copy.deepcopy(old), scales, input_mean)
    sae = fresh(shape, config.seed).to(source.device)
    extend_weights(sae.weights, first, source - input_mean, init=config.extend_init, seed=config.seed)
    return sae


def _scaled(found: TopKSAE, scales: tuple[float, float], input_mean: Tensor) -> TopKSAE:
    """`found`, changed into one of x / scales[0] - input_mean -> t / scales[1], in float32."""
    found.float().to(input_mean.device)
    found.fold_scales(1 / scales[0], 1 / scales[1])
    found.encoder_bias.add_(found.encoder @ input_mean)
    return found


def _check_shape(found: TopKSAE, shape: TopKSAEConfig, what: str, *more: str) -> None:
    if isinstance(found, KronSAE):
        raise TrimtabError(f"{what} is a KronSAE; accepted: a dense dictionary")
    for name in ("d_in", "output_width", "transcoder", "apply_b_dec_to_input", *more):
        mine, other = getattr(shape, name), getattr(found.config, name)
        if mine != other:
            raise TrimtabError(f"{what} has {name}={other}, this dictionary {mine}")


def _hook_of(place: str, otherwise: str) -> str:
    """The place's name in TransformerLens; `otherwise` for a place that is none of a transformer's."""
    try:
        return tl_hook_name(place)
    except TrimtabError:
        return otherwise
