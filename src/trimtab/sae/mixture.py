"""Activations of two texts in one stream: general text replayed while a domain is learned, say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.harvest import ShardSource

__all__ = ["Mixture"]

EMPTY_SHARDS = 16
"""Shards of the other source without a row after which it counts as one that has none."""


class Mixture:
    """Shards of `main` with rows of `other` among them, as a share of all rows: replay of general text, say.

    With r = share / (1 - share), shard i of `main` gets r times its rows from `other`, from i r shards on: where shards
    of both have about the same length, rows of both are used up evenly, about once each.
    Raises TrimtabError for sources of different places or a share outside 0 … 1.
    """

    def __init__(self, main: ShardSource, other: ShardSource, share: float) -> None:
        if main.places != other.places:
            raise TrimtabError(f"places {main.places} and {other.places} of the two sources differ")
        if not 0 < share < 1:
            raise TrimtabError(f"share={share!r} must lie between 0 and 1")
        self._main, self._other, self._share = main, other, share
        self._ratio = share / (1 - share)
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        main = self._main.identity
        return main | {"mixed": [*main.get("mixed", []), {"with": self._other.identity, "share": self._share}]}

    @property
    def places(self) -> tuple[str, ...]:
        return self._main.places

    def shard(self, index: int) -> dict[str, Tensor]:
        main = self._main.shard(index)
        wanted = round(_length(main) * self._ratio)
        number = int(index * self._ratio)
        rows = self._shard_of_other(number)
        start = int((index * self._ratio - number) * _length(rows))
        parts, empty = [main], 0
        while wanted and empty < EMPTY_SHARDS:
            part = {place: states[start : start + wanted].to(main[place].device) for place, states in rows.items()}
            empty = 0 if _length(part) else empty + 1
            wanted -= _length(part)
            parts.append(part)
            if wanted:
                number, start = number + 1, 0
                rows = self._shard_of_other(number)
        return {place: torch.cat([part[place] for part in parts]) for place in self.places}

    def _shard_of_other(self, number: int) -> dict[str, Tensor]:
        """A shard of the other source; the last one is kept, since several of `main` may ask for it."""
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self._other.shard(number))
        return self._kept[1]

    def state(self, index: int) -> dict[str, Any]:
        return {"main": self._main.state(index), "other": self._other.state(int(index * self._ratio))}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._main.restore(state["main"])
        self._other.restore(state["other"])


def _length(rows: Mapping[str, Tensor]) -> int:
    return len(next(iter(rows.values())))
