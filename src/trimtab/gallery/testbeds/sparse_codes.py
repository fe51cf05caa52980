"""Activations whose true sparse code is known, for experiments with dictionaries.

compositional   groups of base and extension directions; an atom is the direction of one pair, as in KronSAE's setting
skewed          independent directions whose frequency falls like a power law, as in HierarchicalTopK's setting
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["Compositional", "Skewed"]


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
