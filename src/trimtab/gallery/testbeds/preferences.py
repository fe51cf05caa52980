"""Preferences over a few hundred answers whose true reward is known, for experiments on over-optimisation.

One prompt, `answers` answers with `d` features phi; a policy is a softmax, so what it is worth is a sum over answers:

    pi_theta(y) = softmax(phi theta)_y,   phi ~ N(0, 1) 2 / sqrt(d),   SFT: theta_0 ~ N(0, 1) 1.2
    r = standardised phi w + 0.6 N(0, 1),   w ~ N(0, 1)
    gain(theta) = E_pi[r] - E_SFT[r],   KL(pi || SFT) = sum_y pi(y) log(pi(y) / SFT(y))

A pair is two different answers drawn from SFT, a before b with probability sigmoid(r_a - r_b): about a quarter of the
pairs prefer the worse answer. The reward is only partly linear in the features and the pairs are few, so that a policy
that fits them ever better ends up with less reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = ["Preferences"]


@dataclass(frozen=True)
class Preferences:
    """One problem for each of `seeds`, stacked in the order given; `draw` makes them, each from its own seed alone."""

    seeds: tuple[int, ...]
    features: Float[Tensor, "seeds answers d"]
    sft: Float[Tensor, "seeds d"]
    reward: Float[Tensor, "seeds answers"]
    chosen: Int[Tensor, "seeds pairs"]
    rejected: Int[Tensor, "seeds pairs"]

    @classmethod
    def draw(
        cls,
        seeds: Sequence[int],
        *,
        answers: int = 400,
        d: int = 60,
        pairs: int = 150,
        dtype: torch.dtype = torch.float32,
    ) -> Preferences:
        """The problems of `seeds`, drawn in float64 and then rounded to `dtype`.

        Raises TrimtabError for no seed, fewer than two answers (which a pair needs), and no feature or pair.
        """
        if not seeds:
            raise TrimtabError("seeds is empty: one or more are accepted.")
        for name, value, least in (("answers", answers, 2), ("d", d, 1), ("pairs", pairs, 1)):
            if value < least:
                raise TrimtabError(f"{name}={value}: {least} or more is accepted.")
        problems = [_problem(seed, answers, d, pairs) for seed in seeds]
        features, sft, reward, chosen, rejected = (torch.stack(parts) for parts in zip(*problems, strict=True))
        return cls(tuple(seeds), features.to(dtype), sft.to(dtype), reward.to(dtype), chosen, rejected)

    def batches(self, steps: int, size: int) -> tuple[Int[Tensor, "steps seeds size"], Int[Tensor, "steps seeds size"]]:
        """The chosen and the rejected answers of `steps` batches, whose pairs are drawn with replacement."""
        pairs = self.chosen.shape[1]
        drawn = [
            torch.randint(pairs, (steps, size), generator=torch.Generator().manual_seed(2**32 + seed))
            for seed in self.seeds
        ]
        rows = torch.stack(drawn, 1)
        chosen, rejected = (side.expand(steps, -1, -1).gather(-1, rows) for side in (self.chosen, self.rejected))
        return chosen, rejected

    def log_probs(self, theta: Float[Tensor, "*policies seeds d"]) -> Float[Tensor, "*policies seeds answers"]:
        """log pi_theta of every answer."""
        return torch.einsum("sad,...sd->...sa", self.features, theta).log_softmax(-1)

    def gain(self, theta: Float[Tensor, "*policies seeds d"]) -> Float[Tensor, "*policies seeds"]:
        """E_pi[r] - E_SFT[r], exactly; r has a standard deviation of about 1.2 over the answers."""
        change = self.log_probs(theta).exp() - self.log_probs(self.sft).exp()
        return (change * self.reward).sum(-1)

    def kl_to_sft(self, theta: Float[Tensor, "*policies seeds d"]) -> Float[Tensor, "*policies seeds"]:
        """KL(pi || SFT), exactly, in nats."""
        log_pi = self.log_probs(theta)
        return (log_pi.exp() * (log_pi - self.log_probs(self.sft))).sum(-1)


def _problem(seed: int, answers: int, d: int, pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The features, SFT's theta, reward, chosen and rejected answers of one seed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    features, sft = normal(answers, d) * (2 / d**0.5), 1.2 * normal(d)
    linear = features @ normal(d)
    reward = (linear - linear.mean()) / linear.std() + 0.6 * normal(answers)
    p = (features @ sft).softmax(0)
    drawn = torch.empty(0, 2, dtype=torch.long)
    while len(drawn) < pairs:
        more = torch.multinomial(p, 2 * pairs, replacement=True, generator=g).view(pairs, 2)
        drawn = torch.cat([drawn, more[more[:, 0] != more[:, 1]]])
    a, b = drawn[:pairs].T
    first = torch.rand(pairs, generator=g, dtype=torch.float64) < torch.sigmoid(reward[a] - reward[b])
    return features, sft, reward, torch.where(first, a, b), torch.where(first, b, a)
