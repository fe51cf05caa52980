"""Where the latents of a dictionary fire in a text: what explanations, statistics and judges are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.harvest import Harvest
from trimtab.sae.modeling import TopKSAE

__all__ = ["Context", "Firings", "LatentFirings", "collect_firings", "evenly_spaced"]


class Context(NamedTuple):
    """Consecutive tokens of the text and the latent's activation on each of them."""

    token_ids: list[int]
    activations: list[float]


class LatentFirings(NamedTuple):
    """Where one latent fires: rising positions in the text, sequence times context plus offset, and its values."""

    positions: np.ndarray
    values: np.ndarray


class Firings:
    """Every (position, latent, value) above 0 of a text, in the order of latents, then positions.

    input_ids [sequences, context]; keep, alike: the tokens that were looked at.
    """

    def __init__(
        self,
        input_ids: Int[Tensor, "sequences context"],
        keep: Bool[Tensor, "sequences context"],
        parts: list[tuple[Tensor, ...]],
    ) -> None:
        latents, positions, values = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        order = np.argsort(latents, kind="stable")  # positions rise already
        self.input_ids, self.keep = input_ids.numpy(), keep.numpy()
        self.kept_tokens = int(self.keep.sum())
        self.latents, self.positions, self._values = latents[order], positions[order], values[order]

    def of(self, latent: int) -> LatentFirings:
        start, stop = np.searchsorted(self.latents, [latent, latent + 1])
        return LatentFirings(self.positions[start:stop], self._values[start:stop])

    def counts(self, n_latents: int) -> Int[Tensor, " n_latents"]:
        """On how many tokens each latent fires."""
        return torch.bincount(torch.from_numpy(self.latents.astype(np.int64)), minlength=n_latents)

    def window(self, found: LatentFirings, start: int, stop: int) -> Context:
        """The tokens from position `start` to before `stop`, of one sequence, and the activations on them."""
        first, last = np.searchsorted(found.positions, [start, stop])
        values = np.zeros(stop - start, dtype=np.float32)
        values[found.positions[first:last] - start] = found.values[first:last]
        return Context(self.input_ids.ravel()[start:stop].tolist(), values.tolist())

    def top_contexts(self, found: LatentFirings, contexts: int, before: int, after: int) -> list[Context]:
        """The windows around the highest activations, leaving out those that overlap with a higher one's."""
        length = self.input_ids.shape[1]
        chosen: list[Context] = []
        covered: list[tuple[int, int]] = []
        for entry in np.argsort(-found.values, kind="stable"):
            if len(chosen) == contexts:
                break
            peak = int(found.positions[entry])
            sequence = peak // length
            start = max(peak - before, sequence * length)
            stop = min(peak + after + 1, (sequence + 1) * length)
            if any(start < other_stop and other_start < stop for other_start, other_stop in covered):
                continue
            chosen.append(self.window(found, start, stop))
            covered.append((start, stop))
        return chosen

    def token_entropy(self, found: LatentFirings) -> float:
        """- sum over tokens i of p_i log p_i, in nats, p_i the share of the activations that fall on token i."""
        shares = np.bincount(self.input_ids.ravel()[found.positions], weights=found.values)
        shares = shares[shares > 0] / shares.sum()
        return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0


@torch.no_grad()
def collect_firings(
    sae: TopKSAE,
    harvest: Harvest,
    *,
    place: str,
    tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Firings:
    """What fires at `place` on about `tokens` tokens of the harvest's text; whole sequences.

    Memory: about 12 bytes for each token and each latent that fires on it. advance: told the tokens that are done.
    Raises TrimtabError for a place that `harvest` does not read, and for a text without tokens to look at.
    """
    if place not in harvest.places:
        raise unknown("place", place, harvest.places)
    if tokens < 1:
        raise TrimtabError(f"tokens={tokens} must be at least 1")
    context = harvest.config.context
    ids, keeps, parts, sequences = [], [], [], 0
    for forward in harvest.forwards(sequences=-(-tokens // context)):
        where = forward.keep.reshape(-1).nonzero()[:, 0] + sequences * context
        latents = sae.encode_sparse(forward.rows(place).to(sae.device))
        rows, columns = (latents.values > 0).nonzero(as_tuple=True)
        entries = (latents.indices[rows, columns].int(), where[rows].int(), latents.values[rows, columns])
        parts.append(tuple(entry.cpu() for entry in entries))
        ids.append(forward.input_ids.cpu().int())
        keeps.append(forward.keep.cpu())
        sequences += len(forward.input_ids)
        advance(forward.input_ids.numel())
    if not any(keep.any() for keep in keeps):
        raise TrimtabError("the text holds only special tokens and attention sinks: nothing to look at latents by")
    return Firings(torch.cat(ids), torch.cat(keeps), parts)


def evenly_spaced(counts: Int[Tensor, " n_latents"], among: Int[Tensor, " some"], n_latents: int) -> list[int]:
    """Up to `n_latents` of the latents `among`, rising: evenly spaced in the order of how often they fire."""
    by_density = among[counts[among].argsort(stable=True)]
    spaced = np.linspace(0, len(among) - 1, min(n_latents, len(among))).round().astype(np.int64)
    return sorted(by_density[torch.from_numpy(spaced)].tolist())
