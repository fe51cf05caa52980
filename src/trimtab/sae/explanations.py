"""What a dictionary's latents respond to: top activating contexts, promoted tokens, and the latents of a given text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import activations as act
from trimtab.core.errors import TrimtabError
from trimtab.core.lens import direction_tokens
from trimtab.core.text import special_ids
from trimtab.sae.firings import Context, collect_firings, evenly_spaced
from trimtab.sae.harvest import Harvest, longest_context
from trimtab.sae.modeling import TopKSAE

__all__ = ["LatentExplanation", "TokenLatents", "explain", "latents_of_text", "multitoken_ratio"]


@dataclass(frozen=True, kw_only=True)
class LatentExplanation:
    """One latent: how often it fires, where it fires most, and which tokens its decoder direction moves.

    token_entropy: - sum over tokens i of p_i log p_i, in nats, p_i the share of the latent's activations that fall on
        token i of the vocabulary: 0 for a latent of one token.
    promoted, suppressed: (token, logit) of the decoder row through the model's unembedding, strongest first; empty
    if it has none. contexts: non-overlapping, by falling peak.
    """

    latent: int
    density: float
    max_activation: float
    token_entropy: float
    contexts: list[Context]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]

    @property
    def multitoken_ratio(self) -> float:
        """Mean over the contexts of the share of their tokens on which the latent fires."""
        return multitoken_ratio(self.contexts)


def multitoken_ratio(contexts: Sequence[Context]) -> float:
    """Mean over the contexts of the share of their tokens on which the latent fires."""
    return sum(sum(value > 0 for value in c.activations) / len(c.activations) for c in contexts) / len(contexts)


@torch.no_grad()
def explain(
    sae: TopKSAE,
    harvest: Harvest,
    *,
    place: str,
    tokens: int = 131_072,
    n_latents: int = 2_000,
    contexts: int = 8,
    before: int = 16,
    after: int = 8,
    lens_tokens: int = 8,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[LatentExplanation], Float[Tensor, " n_latents"]]:
    """Explanations of up to `n_latents` latents, from about `tokens` tokens of the harvest's text, and all densities.

    If more latents fire at all, those explained are evenly spaced in the order of density, so that rare and common ones
    are there in proportion. Each context holds `before` tokens before the peak and `after` after it, in one sequence.
    Memory: about 12 bytes for each of the tokens' k latents.
    Raises TrimtabError for a place that `harvest` does not read, and for a text without tokens to look at.
    """
    for name, value in (("n_latents", n_latents), ("contexts", contexts)):
        if value < 1:
            raise TrimtabError(f"{name}={value} must be at least 1")
    firings = collect_firings(sae, harvest, place=place, tokens=tokens, advance=advance)
    counts = firings.counts(sae.config.n_latents)
    densities = (counts / firings.kept_tokens).float()
    chosen = evenly_spaced(counts, (counts > 0).nonzero()[:, 0], n_latents)
    directions = sae.decoder[chosen]
    has_head = getattr(harvest.model, "get_output_embeddings", lambda: None)() is not None
    promoted, suppressed = (
        direction_tokens(harvest.model, harvest.tokenizer, sign * directions, lens_tokens) if has_head else []
        for sign in (1, -1)
    )
    explanations = []
    for i, latent in enumerate(chosen):
        found = firings.of(latent)
        explanations.append(
            LatentExplanation(
                latent=latent,
                density=densities[latent].item(),
                max_activation=float(found.values.max()),
                token_entropy=firings.token_entropy(found),
                contexts=firings.top_contexts(found, contexts, before, after),
                promoted=promoted[i] if promoted else [],
                suppressed=[(token, -logit) for token, logit in suppressed[i]] if suppressed else [],
            )
        )
    return explanations, densities


class TokenLatents(NamedTuple):
    """A token of a text and its latents, strongest first; none at special tokens."""

    token_id: int
    latents: list[tuple[int, float]]


@torch.no_grad()
def latents_of_text(
    sae: TopKSAE, model: nn.Module, tokenizer: Any, text: str, *, place: str, layers: nn.ModuleList | str | None = None
) -> list[TokenLatents]:
    """Which latents fire on `text`, token by token."""
    token_ids = tokenizer(text).input_ids
    special = special_ids(tokenizer)
    if special.issuperset(token_ids):
        raise TrimtabError(f"text={text!r} holds no token to read")
    longest = longest_context(model)
    if longest is not None and len(token_ids) > longest:
        raise TrimtabError(f"text of {len(token_ids)} tokens is beyond the model's {longest} positions")
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    states = act.read(model, [place], {"input_ids": ids}, layers=layers)[place]
    values, indices = sae.encode_sparse(states[0].to(sae.device).float())
    rows = []
    for t, token_id in enumerate(token_ids):
        pairs = zip(indices[t].tolist(), values[t].tolist(), strict=True)
        latents = [] if token_id in special else sorted((p for p in pairs if p[1] > 0), key=lambda pair: -pair[1])
        rows.append(TokenLatents(token_id, latents))
    return rows
