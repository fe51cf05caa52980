"""Activations of two texts in one stream: general text replayed while a domain is learned, say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.harvest import ShardSource

__all__ = ["Mixture"]


class Mixture:
    """Shards of `main` with rows of `other` among them, as a share of all rows: replay of general text, say.

    Each shard of `other` serves several of `main`, from one place in it to the next and round again.
    Raises TrimtabError for sources of different places or a share outside 0 … 1.
    """

    def __init__(self, main: ShardSource, other: ShardSource, share: float) -> None:
        if main.places != other.places:
            raise TrimtabError(f"places {main.places} and {other.places} of the two sources differ")
        if not 0 < share < 1:
            raise TrimtabError(f"share={share!r} must lie between 0 and 1")
        self._main, self._other, self._share = main, other, share
        self._serves = max(1, round((1 - share) / share))
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        main = self._main.identity
        return main | {"mixed": [*main.get("mixed", []), {"with": self._other.identity, "share": self._share}]}

    @property
    def places(self) -> tuple[str, ...]:
        return self._main.places

    def shard(self, index: int) -> dict[str, Tensor]:
        main, turn = self._main.shard(index), index % self._serves
        if self._kept is None or self._kept[0] != index // self._serves:
            self._kept = (index // self._serves, self._other.shard(index // self._serves))
        other = self._kept[1]
        kept, there = (len(next(iter(rows.values()))) for rows in (main, other))
        if not there:
            return main
        wanted = round(kept * self._share / (1 - self._share))
        chosen = (torch.arange(wanted) + turn * there // self._serves) % there
        return {place: torch.cat([rows, other[place][chosen.to(rows.device)]]) for place, rows in main.items()}

    def state(self, index: int) -> dict[str, Any]:
        return {"main": self._main.state(index), "other": self._other.state(index // self._serves)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._main.restore(state["main"])
        self._other.restore(state["other"])
