"""Statistics of all latents of a dictionary on a text: how often and on what they fire.

    density            share of the tokens on which the latent fires
    dead fraction      share of the latents that never fire
    token entropy      - sum over tokens i of p_i log p_i, p_i the share of the latent's activations on token i, in nats
    multitoken ratio   mean over its top contexts of the share of their tokens on which it fires

Source of the last two: KronSAE, arXiv 2505.22255v3, section 5. `trimtab.sae.explain` has the same of single latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.explanations import multitoken_ratio
from trimtab.sae.firings import collect_firings
from trimtab.sae.harvest import Harvest
from trimtab.sae.modeling import TopKSAE

__all__ = ["LatentStatistics", "latent_statistics"]


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """The figures of each latent, float32; NaN for the entropy and ratio of a latent that never fires."""

    density: Float[Tensor, " n_latents"]
    token_entropy: Float[Tensor, " n_latents"]
    multitoken_ratio: Float[Tensor, " n_latents"]

    def __getitem__(self, part: slice) -> LatentStatistics:
        """Those of some of the latents."""
        return LatentStatistics(
            density=self.density[part],
            token_entropy=self.token_entropy[part],
            multitoken_ratio=self.multitoken_ratio[part],
        )

    @property
    def dead_fraction(self) -> float:
        """Share of the latents that never fire."""
        return (self.density == 0).double().mean().item()

    def summary(self) -> dict[str, float]:
        """The dead fraction, the mean density, and the means of the rest over the latents that fire."""
        return {
            "density": self.density.mean().item(),
            "dead_fraction": self.dead_fraction,
            "token_entropy": self.token_entropy.nanmean().item(),
            "multitoken_ratio": self.multitoken_ratio.nanmean().item(),
        }


def latent_statistics(
    sae: TopKSAE,
    harvest: Harvest,
    *,
    place: str,
    tokens: int = 131_072,
    contexts: int = 8,
    before: int = 16,
    after: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> LatentStatistics:
    """Statistics from about `tokens` tokens of the harvest's text; the arguments are those of `trimtab.sae.explain`.

    Raises TrimtabError for a place that `harvest` does not read, and for a text without tokens to look at.
    """
    if contexts < 1:
        raise TrimtabError(f"contexts={contexts} must be at least 1")
    firings = collect_firings(sae, harvest, place=place, tokens=tokens, advance=advance)
    counts = firings.counts(sae.config.n_latents)
    entropy, ratio = torch.full((2, len(counts)), float("nan"))
    for latent in counts.nonzero()[:, 0].tolist():
        found = firings.of(latent)
        entropy[latent] = firings.token_entropy(found)
        ratio[latent] = multitoken_ratio(firings.top_contexts(found, contexts, before, after))
    return LatentStatistics(
        density=(counts / firings.kept_tokens).float(), token_entropy=entropy, multitoken_ratio=ratio
    )
