"""What a KronSAE's pre-latents and post-latents respond to, and which post-latents share a head.

Source: KronSAE, arXiv 2505.22255v3, section 5. Symbols as in `trimtab.sae.kron`: for each of h heads p [m] and q [n]
are the base and extension pre-latents after their ReLU; the post-latents are the dictionary's own. Pre-latents are
counted base first:

    k m + i          p_i of head k
    h m + k n + j    q_j of head k

The paper says that latents which fire together come to lie in one head. With r the Pearson correlation of two latents'
activations over tokens,

    within = mean of r over pairs of latents of one head,    across = the same over pairs of different heads

Neither needs the F x F matrix: for standardised activations s the sum of r over all pairs of a set, each latent with
itself included, is the mean over tokens of (sum of s over the set)^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.encodings import Latents
from trimtab.sae.harvest import Harvest
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.kron import KronSAE
from trimtab.sae.latent_statistics import LatentStatistics, latent_statistics

__all__ = [
    "HeadCorrelation",
    "KronStatistics",
    "PreLatents",
    "head_correlation",
    "kron_statistics",
    "pre_latent_dictionary",
    "pre_latents",
]


class PreLatents(NamedTuple):
    """Pre-latents after their ReLU."""

    base: Float[Tensor, "*tokens hm"]
    extension: Float[Tensor, "*tokens hn"]


class KronStatistics(NamedTuple):
    """Statistics of base and extension pre-latents and of post-latents."""

    base: LatentStatistics
    extension: LatentStatistics
    post: LatentStatistics


class HeadCorrelation(NamedTuple):
    """Mean correlation of two latents of one head, and of two of different heads."""

    within: float
    across: float


def pre_latents(sae: KronSAE, x: Float[Tensor, "*tokens d_in"]) -> PreLatents:
    """p and q of all heads, in the order of the module's docstring; differentiable.

    Raises TrimtabError for the ablation "product", whose pre-latents pass no ReLU.
    """
    config, rows = sae.config, _rows(sae)
    x = x.to(sae.dtype) - sae.decoder_bias if config.apply_b_dec_to_input else x.to(sae.dtype)
    pre = torch.nn.functional.linear(x, sae.encoder[rows], sae.encoder_bias[rows]).relu()
    return PreLatents(*pre.split([config.h * config.m, config.h * config.n], -1))


def pre_latent_dictionary(sae: KronSAE) -> JumpReLUSAE:
    """The pre-latents as the latents of a ReLU dictionary, for `explain`, `latent_statistics` and `score_latents`.

    Its encoder rows are copies of the KronSAE's. Its decoder rows are the means of those of the post-latents that a
    pre-latent has a part in: what it helps to write; reconstructions from it mean nothing.
    Raises TrimtabError as `pre_latents` does.
    """
    config, rows = sae.config, _rows(sae)
    pre = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=config.d_in,
            d_out=config.d_out,
            n_latents=config.rows,
            transcoder=config.transcoder,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            metadata=config.metadata,
        )
    ).to(sae.device, sae.dtype)
    decoder = sae.decoder.unflatten(0, (config.h, config.m, config.n))
    with torch.no_grad():
        pre.encoder.copy_(sae.encoder[rows])
        pre.encoder_bias.copy_(sae.encoder_bias[rows])
        pre.decoder.copy_(torch.cat([decoder.mean(2).flatten(0, 1), decoder.mean(1).flatten(0, 1)]))
        pre.decoder_bias.copy_(sae.decoder_bias)
    return pre


def kron_statistics(
    sae: KronSAE,
    harvest: Harvest,
    *,
    place: str,
    tokens: int = 16_384,
    advance: Callable[[int], None] = lambda tokens: None,
) -> KronStatistics:
    """`latent_statistics` of all three kinds, on the same text, which is read twice.

    A pre-latent may fire on half of all tokens: memory is about 6 bytes for each token and pre-latent then.
    """
    pre, post = (
        latent_statistics(dictionary, harvest, place=place, tokens=tokens, advance=advance)
        for dictionary in (pre_latent_dictionary(sae), sae)
    )
    bases = sae.config.h * sae.config.m
    return KronStatistics(pre[:bases], pre[bases:], post)


@torch.no_grad()
def head_correlation(sae: KronSAE, x: Float[Tensor, "tokens d_in"]) -> HeadCorrelation:
    """Mean correlations of the post-latents that TopK keeps; those that do not vary over `x` are left out.

    NaN where there is no pair, such as across the heads of a KronSAE of one head.
    """
    if len(x) < 2:
        raise TrimtabError(f"x has {len(x)} tokens; a correlation needs at least 2")
    return _correlation(sae.encode_sparse(x), sae.config.n_latents, sae.config.h)


def _correlation(latents: Latents, n_latents: int, heads: int) -> HeadCorrelation:
    values, indices = latents.values.double(), latents.indices
    tokens = len(values)
    flat = indices.flatten()
    mean, square = (
        values.new_zeros(n_latents).index_add_(0, flat, v.flatten()) / tokens for v in (values, values.square())
    )
    variance = square - mean.square()
    varies = variance > 1e-12 * square
    scale = torch.where(varies, variance, 1.0).rsqrt() * varies
    per_head = n_latents // heads
    sums = -(mean * scale).view(heads, per_head).sum(1).expand(tokens, -1)
    sums = sums.scatter_add(1, indices // per_head, values * scale[indices])
    count = varies.view(heads, per_head).sum(1).double()
    one_head, together = sums.square().mean(0).sum(), sums.sum(1).square().mean()
    return HeadCorrelation(
        within=_mean(one_head - count.sum(), (count * (count - 1)).sum()),
        across=_mean(together - one_head, count.sum().square() - count.square().sum()),
    )


def _mean(total: Tensor, pairs: Tensor) -> float:
    return (total / pairs).item() if pairs else float("nan")


def _rows(sae: KronSAE) -> Int[Tensor, " rows"]:
    """The row of each pre-latent in the encoder, which counts component by component."""
    config = sae.config
    if config.activation == "product":
        raise TrimtabError("activation='product' has no pre-latents after a ReLU; accepted: 'mand', 'relu_product'")
    by_head = torch.arange(config.rows, device=sae.device).view(config.m + config.n, config.h).T
    return torch.cat([by_head[:, : config.m].flatten(), by_head[:, config.m :].flatten()])
