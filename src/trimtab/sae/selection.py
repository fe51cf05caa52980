"""Which latents count: the k largest of a token, or k tokens' worth of a batch, over all processes that share them.

Sources: TopK, Gao et al. 2024, arXiv 2406.04093; BatchTopK, Bussmann et al. 2024, arXiv 2412.06410.

With a dictionary that several processes hold (`trimtab.sae.parallel`), each looks at its own latents first and keeps
those of them that count among all.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.sae.encodings import Encoding, Latents, Pullback
from trimtab.sae.kernels import Precision
from trimtab.sae.parallel import ALONE, Processes

__all__ = ["Sparsifier", "batch_top", "largest", "top"]

Sparsifier = Literal["topk", "batch_topk", "jumprelu"]
"""`jumprelu` selects by thresholds that train, in `trimtab.sae.thresholds`."""

CANDIDATES = 4
"""How many times k latents of a token are looked at first, for a batch's largest."""


def top(
    encoding: Encoding,
    x: Float[Tensor, "tokens d"],
    encoder: Float[Tensor, "rows d"],
    bias: Float[Tensor, " rows"],
    k: int,
    n_latents: int,
    *,
    precision: Precision = "float32",
    among: Int[Tensor, " some"] | None = None,
    processes: Processes = ALONE,
) -> tuple[Latents, Pullback]:
    """The k largest latents of each token; of the `n_latents` of this process, those of them that are its own.

    among: only these of this process's latents; may be empty where another process has some.
    """
    own = n_latents if among is None else len(among)
    if not own:
        nothing = Latents(x.new_zeros(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))
        return largest(nothing, lambda d_values: (0 * d_values, nothing.indices), k, processes)
    latents, pullback = encoding.top(x, encoder, bias, min(k, own), precision=precision, among=among)
    return largest(latents, pullback, k, processes)


def largest(latents: Latents, pullback: Pullback, k: int, processes: Processes = ALONE) -> tuple[Latents, Pullback]:
    """Of each token's latents, each process's among its own, those that are among the k largest of all processes."""
    values, width = processes.even(latents.values), latents.values.shape[1]
    if values.shape[1] * processes.shards <= k:
        return latents, pullback
    together = processes.gathered(values, -1)
    best = together.topk(k, dim=-1, sorted=False).indices
    kept = torch.zeros_like(together, dtype=torch.bool).scatter_(1, best, True)
    first = processes.shard * values.shape[1]
    return _narrowed(latents, pullback, kept[:, first : first + width] & (latents.values > 0))


def batch_top(
    encoding: Encoding,
    x: Float[Tensor, "tokens d"],
    encoder: Float[Tensor, "rows d"],
    bias: Float[Tensor, " rows"],
    k: int,
    n_latents: int,
    *,
    precision: Precision = "float32",
    processes: Processes = ALONE,
) -> tuple[Latents, Pullback]:
    """The k tokens' worth of largest positive latents of the batch; a token's slots are as many as the fullest uses.

    Exact: a token's candidates are its largest latents, and if the last of them still makes the cut somewhere, twice as
    many are looked at. The batch is that of all processes.
    """
    count = k * len(x) * processes.groups
    width = min(CANDIDATES * k, n_latents)
    while True:
        latents, pullback = encoding.top(x, encoder, bias, width, precision=precision)
        flat = latents.values.flatten()
        best = flat.topk(min(count, len(flat)), sorted=False)
        everyone, mine = processes.of_everyone(best.values)
        chosen = everyone.topk(min(count, len(everyone)), sorted=False)
        cut = chosen.values.min() if len(everyone) > count or len(flat) > count else flat.new_zeros(())
        short = (latents.values.amin(-1) > cut).any()
        if width == n_latents or not processes.largest(short.to(flat)):
            break
        width = min(2 * width, n_latents)
    among_best = torch.zeros_like(everyone, dtype=torch.bool).index_fill_(0, chosen.indices, True)[mine]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, best.indices, among_best)
    return _narrowed(latents, pullback, kept.view_as(latents.values) & (latents.values > 0))


def _narrowed(latents: Latents, pullback: Pullback, kept: Bool[Tensor, "tokens k"]) -> tuple[Latents, Pullback]:
    """The slots of each token that are `kept`, as many as the fullest token uses, at least one; 0 in the others."""
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    order = order[:, : max(int(kept.sum(-1).max()), 1)]
    values, indices = latents.values * kept, latents.indices

    def narrow(d_values: Tensor) -> tuple[Tensor, Tensor]:
        return pullback(torch.zeros_like(values).scatter_(-1, order, d_values) * kept)

    return Latents(values.gather(-1, order), indices.gather(-1, order)), narrow
