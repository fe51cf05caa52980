"""Activations whose true sparse code is known, for experiments with dictionaries.

compositional   groups of base and extension directions; an atom is the direction of one pair, as in KronSAE's setting
skewed          independent directions whose frequency falls like a power law, as in HierarchicalTopK's setting
hierarchy       parents and their children, for feature absorption
correlated      features of a known covariance, for its recovery, in KronSAE's setting
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Compositional", "Correlated", "Hierarchy", "HierarchySample", "Skewed"]


@dataclass(frozen=True)
class Compositional:
    """`groups` groups of `bases` x `extensions` atoms in `d` dimensions; `seed` draws the directions.

    Atom (g, i, j) points along P_gi + Q_gj + 0.7 noise. On a token each group is on with probability 0.4, with one base
    and one extension, of which small j are frequent (j = floor(8 u^1.5)), and with probability 0.3 a second extension
    of the same base; magnitudes are 0.5 + uniform.
    """

    d: int = 64
    groups: int = 16
    bases: int = 4
    extensions: int = 8
    seed: int = 0

    def sample(self, tokens: int, *, seed: int) -> Float[Tensor, "tokens d"]:
        """`tokens` activations, float32."""
        atoms = self._atoms()
        g = torch.Generator().manual_seed(seed)
        shape = (tokens, self.groups)
        on = torch.rand(shape, generator=g) < 0.4
        base = torch.randint(self.bases, shape, generator=g)
        x = torch.zeros(tokens, self.d)
        for second in (False, True):
            extension = (self.extensions * torch.rand(shape, generator=g) ** 1.5).long()
            magnitude = 0.5 + torch.rand(shape, generator=g)
            used = on & (torch.rand(shape, generator=g) < 0.3) if second else on
            for group in range(self.groups):
                chosen = atoms[group, base[:, group], extension[:, group]]
                x += chosen * (magnitude * used)[:, group, None]
        return x

    def _atoms(self) -> Float[Tensor, "groups bases extensions d"]:
        g = torch.Generator().manual_seed(self.seed)
        p = F.normalize(torch.randn(self.groups, self.bases, 1, self.d, generator=g), dim=-1)
        q = F.normalize(torch.randn(self.groups, 1, self.extensions, self.d, generator=g), dim=-1)
        noise = F.normalize(torch.randn(self.groups, self.bases, self.extensions, self.d, generator=g), dim=-1)
        return F.normalize(p + q + 0.7 * noise, dim=-1)


@dataclass(frozen=True)
class Skewed:
    """`features` unit directions in `d` dimensions, `active` of them on a token on average; `seed` draws them.

    Feature i is on with probability in proportion to (i + 1)^-0.9, at most 0.6, with magnitude lognormal(0, 0.5) of the
    feature times uniform + 0.3.
    """

    d: int = 64
    features: int = 512
    active: float = 16.0
    seed: int = 0

    def sample(self, tokens: int, *, seed: int) -> Float[Tensor, "tokens d"]:
        """`tokens` activations, float32."""
        g = torch.Generator().manual_seed(self.seed)
        directions = F.normalize(torch.randn(self.features, self.d, generator=g), dim=-1)
        strength = (0.5 * torch.randn(self.features, generator=g)).exp()
        frequency = torch.arange(1, self.features + 1).float() ** -0.9
        share = (frequency * (self.active / frequency.sum())).clamp_max(0.6)
        for _ in range(20):  # what the clamp cut off goes to the others
            rest = share < 0.6
            share = torch.where(rest, share * ((self.active - share[~rest].sum()) / share[rest].sum()), share)
            share = share.clamp_max(0.6)
        h = torch.Generator().manual_seed(seed)
        on = torch.rand(tokens, self.features, generator=h) < share
        magnitude = strength * (torch.rand(tokens, self.features, generator=h) + 0.3)
        return (on * magnitude) @ directions


class HierarchySample(NamedTuple):
    """Activations, and where each parent and each child is on."""

    x: Float[Tensor, "tokens d"]
    parents: Bool[Tensor, "tokens parents"]
    children: Bool[Tensor, "tokens parents children"]


@dataclass(frozen=True)
class Hierarchy:
    """`parents` features in `d` dimensions with `children` special cases each; `seed` draws the directions.

    A parent is on with probability 0.15, each of its children with probability 0.12 where it is, with a direction of
    its own; magnitudes, of parents and children alike, are 0.5 + uniform.
    """

    d: int = 48
    parents: int = 16
    children: int = 4
    seed: int = 0

    def directions(self) -> Float[Tensor, "parents features d"]:
        """Unit directions of each parent, in place 0, and of its children."""
        g = torch.Generator().manual_seed(self.seed)
        return F.normalize(torch.randn(self.parents, 1 + self.children, self.d, generator=g), dim=-1)

    def sample(self, tokens: int, *, seed: int) -> HierarchySample:
        """`tokens` activations, float32, with their features."""
        g = torch.Generator().manual_seed(seed)
        parents = torch.rand(tokens, self.parents, generator=g) < 0.15
        children = (torch.rand(tokens, self.parents, self.children, generator=g) < 0.12) & parents[..., None]
        on = torch.cat([parents[..., None], children], -1)
        magnitudes = on * (0.5 + torch.rand(on.shape, generator=g))
        return HierarchySample(magnitudes.flatten(1) @ self.directions().flatten(0, 1), parents, children)


@dataclass(frozen=True)
class Correlated:
    """`features` sparse features whose covariance is known: KronSAE's toy setting (arXiv 2505.22255v3, section 5).

        S = L L^T,   g ~ N(0, 1)^F,   features of a token = L TopK(relu(g))

    S is made of `blocks` equal blocks on the diagonal, each (1 - c) I + c 1 1^T with c uniform in 0.2 … 0.9; `seed`
    draws them. The paper does not say what its blocks are.
    """

    features: int = 256
    blocks: int = 16
    active: int = 8
    seed: int = 0

    def covariance(self) -> Float[Tensor, "features features"]:
        """S, float64."""
        g = torch.Generator().manual_seed(self.seed)
        size = self.features // self.blocks
        shares = 0.2 + 0.7 * torch.rand(self.blocks, generator=g, dtype=torch.float64)
        blocks = [(1 - c) * torch.eye(size, dtype=torch.float64) + c for c in shares]
        return torch.block_diag(*blocks)

    def sample(self, tokens: int, *, seed: int) -> Float[Tensor, "tokens features"]:
        """The features of `tokens` tokens, float32."""
        g = torch.Generator().manual_seed(seed)
        top = torch.randn(tokens, self.features, generator=g).relu().topk(self.active, dim=-1)
        chosen = torch.zeros(tokens, self.features).scatter_(1, top.indices, top.values)
        return chosen @ torch.linalg.cholesky(self.covariance()).float().T


def superposition(
    bed: Correlated, d: int = 64, *, steps: int = 1000, batch_size: int = 512, seed: int = 0
) -> Float[Tensor, "features d"]:
    """Directions in `d` dimensions for the features of `bed`: the weights W of x' = relu(W W^T x + b), trained by Adam.

    A token's activation is then its features times W, from which a dictionary has to find them again.
    """
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(bed.features, d, generator=g) / d**0.5).requires_grad_()
    bias = torch.zeros(bed.features, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=3e-3)
    for step in range(steps):
        x = bed.sample(batch_size, seed=seed + step)
        loss = (x @ weight @ weight.T + bias).relu().sub(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()
