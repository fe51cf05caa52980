"""Feature absorption: latents of a general feature that fall silent where a special case of it has a latent of its own.

Sources: Chanin et al., arXiv 2409.14507; the definitions are those of SAEBench 0.6.0 (evaluation "absorption"), for
features whose tokens are known. A *parent* is a general feature, its *children* are special cases: a child is on only
where its parent is.

Symbols: x [tokens, d] activations; f their latents; D the decoder, latents as rows; v the parent's unit direction
in x (in SAEBench a probe's); l* the parent's latent: the one whose firing tells best, by F1, where the parent is on,
among the tokens on which none of its children is.

    recall alone / with a child    share of the parent's tokens without / with a child on which l* fires
    r_l = f_l <D_l, v>             what latent l contributes to the projection <x, v>
    A                              the sum of the 3 largest r_l > 0, l not l*, with cos(D_l, v) >= 0.1

    full absorption of a token     f_l* = 0, and the latent of the largest r_l has cos(D_l, v) >= 0.025, and
                                   <x, v> > 0, and r_l >= 0.4 <x, v>
    absorption fraction            0  where r_l* >= <x, v> or A < 0.4 <x, v> or <x, v> <= 0,  else 1  where r_l* <= 0,
                                   else a / (a + r_l*),  a = min(A, <x, v> - r_l*)

SAEBench takes means over all tokens on which the parent is found; here there are also those over the tokens on which a
child is on, where absorption can happen. It allows several latents a parent ("splits") where a second one adds 0.03 to
F1; here there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import kernels
from trimtab.sae.encodings import Latents

__all__ = ["AbsorptionReport", "absorption", "parent_latents", "token_absorption"]

FULL_COSINE, PART_COSINE, PROPORTION, ABSORBERS = 0.025, 0.1, 0.4, 3
"""SAEBench's thresholds."""


@dataclass(frozen=True, kw_only=True)
class AbsorptionReport:
    """What `absorption` measured, [parents] each.

    latent: l*, and its f1. full_absorption, absorption_fraction: means over the parent's tokens on which a child is on;
    saebench_full_absorption, saebench_absorption_fraction: over all of the parent's tokens.
    """

    latent: Int[Tensor, " parents"]
    f1: Float[Tensor, " parents"]
    recall_alone: Float[Tensor, " parents"]
    recall_with_child: Float[Tensor, " parents"]
    full_absorption: Float[Tensor, " parents"]
    absorption_fraction: Float[Tensor, " parents"]
    saebench_full_absorption: Float[Tensor, " parents"]
    saebench_absorption_fraction: Float[Tensor, " parents"]

    @property
    def recall_drop(self) -> Float[Tensor, " parents"]:
        """Recall alone less recall with a child."""
        return self.recall_alone - self.recall_with_child

    def summary(self) -> dict[str, float]:
        """Means over the parents, by name."""
        names = [field.name for field in fields(self) if field.name != "latent"] + ["recall_drop"]
        return {name: getattr(self, name).mean().item() for name in names}


class TokenAbsorption(NamedTuple):
    """Absorption of one parent, token by token."""

    full: Bool[Tensor, " tokens"]
    fraction: Float[Tensor, " tokens"]


def parent_latents(
    latents: Latents | Tensor, parents: Tensor, children: Tensor
) -> tuple[Int[Tensor, " parents"], Float[Tensor, " parents"]]:
    """l* of each parent and its F1.

    latents: sparse, or dense [tokens, n_latents]. parents [tokens, parents] and children [tokens, parents, children]:
    where each is on, bool.
    Raises TrimtabError for shapes that do not fit, a child on without its parent, and a parent that is never on alone.
    """
    sparse = _sparse(latents)
    _check_labels(len(sparse.values), parents, children)
    other = ~children.any(-1)
    alone = parents & other
    _refuse_none(alone, "on without any of its children")
    size = int(sparse.indices.max()) + 1
    fires = (sparse.values > 0).double()
    hits, fired = (
        kernels.add_outer(fires, sparse.indices, tokens.double(), fires.new_empty(size, tokens.shape[1]))
        for tokens in (alone, other)
    )
    f1, latent = (2 * hits / (fired + alone.sum(0))).max(0)
    return latent, f1.float()


def token_absorption(
    latents: Latents | Tensor,
    main: int,
    x: Float[Tensor, "tokens d"],
    decoder: Float[Tensor, "n_latents d"],
    direction: Float[Tensor, " d"],
) -> TokenAbsorption:
    """Whether, and how far, latent `main` is absorbed on each token; `direction` of any length above 0."""
    values, indices = _sparse(latents)
    v = F.normalize(direction, dim=0)
    along = decoder @ v
    cosines = along / decoder.norm(dim=-1).clamp_min(torch.finfo(decoder.dtype).tiny)
    contributions, cosines, projection = values * along[indices], cosines[indices], x @ v
    is_main = (indices == main) & (values > 0)
    own = (contributions * is_main).sum(-1)
    absorbing = contributions.where(~is_main & (cosines >= PART_COSINE), 0.0).relu()
    others = absorbing.topk(min(ABSORBERS, absorbing.shape[-1]), dim=-1).values.sum(-1)
    taken = torch.minimum(others, projection - own)
    fraction = torch.where(own <= 0, 1.0, taken / (taken + own))
    none = (projection <= 0) | (own >= projection) | (others < PROPORTION * projection)
    largest, slot = contributions.max(-1)
    aligned = cosines.gather(-1, slot[:, None])[:, 0] >= FULL_COSINE
    full = ~is_main.any(-1) & aligned & (projection > 0) & (largest >= PROPORTION * projection)
    return TokenAbsorption(full, fraction.masked_fill(none, 0.0))


@torch.no_grad()
def absorption(
    latents: Latents | Tensor,
    x: Float[Tensor, "tokens d"],
    decoder: Float[Tensor, "n_latents d"],
    *,
    parents: Tensor,
    children: Tensor,
    directions: Float[Tensor, "parents d"],
) -> AbsorptionReport:
    """How far the children of each parent absorb it, on tokens whose features are known.

    The arguments are those of `parent_latents` and `token_absorption`, `directions` holding one v for each parent.
    Raises TrimtabError as `parent_latents` does, and for a parent that is never on with a child.
    """
    sparse = _sparse(latents)
    latent, f1 = parent_latents(sparse, parents, children)
    with_child = parents & children.any(-1)
    _refuse_none(with_child, "on with one of its children")
    if not (directions.norm(dim=-1) > 0).all():
        raise TrimtabError("directions hold a zero vector; accepted: one direction for each parent")
    fires = ((sparse.indices[:, None] == latent[:, None]) & (sparse.values[:, None] > 0)).any(-1)  # [tokens, parents]
    found = [
        token_absorption(sparse, main, x, decoder, direction)
        for main, direction in zip(latent.tolist(), directions, strict=True)
    ]
    full, fraction = (torch.stack(column, -1) for column in zip(*found, strict=True))

    def mean(quantity: Tensor, tokens: Tensor) -> Tensor:
        return ((quantity * tokens).sum(0) / tokens.sum(0)).float()

    return AbsorptionReport(
        latent=latent,
        f1=f1,
        recall_alone=mean(fires, parents & ~with_child),
        recall_with_child=mean(fires, with_child),
        full_absorption=mean(full, with_child),
        absorption_fraction=mean(fraction, with_child),
        saebench_full_absorption=mean(full, parents),
        saebench_absorption_fraction=mean(fraction, parents),
    )


def _sparse(latents: Latents | Tensor) -> Latents:
    if isinstance(latents, Latents):
        return latents
    width = max(int((latents > 0).sum(-1).max()), 1)
    return Latents(*latents.relu().topk(width, dim=-1))


def _check_labels(tokens: int, parents: Tensor, children: Tensor) -> None:
    for name, labels, dimensions in (("parents", parents, 2), ("children", children, 3)):
        if labels.dtype != torch.bool or labels.ndim != dimensions or len(labels) != tokens:
            raise TrimtabError(
                f"{name} of shape {list(labels.shape)} and {labels.dtype}; accepted: bool, {dimensions} dimensions, "
                f"the first of the latents' {tokens} tokens"
            )
    if children.shape[1] != parents.shape[1]:
        raise TrimtabError(f"children are those of {children.shape[1]} parents, of which there are {parents.shape[1]}")
    if (children.any(-1) & ~parents).any():
        raise TrimtabError("children are on where their parent is not; accepted: only with it")


def _refuse_none(tokens: Tensor, what: str) -> None:
    never = (~tokens.any(0)).nonzero()[:, 0].tolist()
    if never:
        raise TrimtabError(f"parents {never} are never {what}: more tokens are needed")
