"""Batches that mix the sequences of two shards, in an order that can be rebuilt from a seed and two numbers.

Shard i is permuted and cut in halves A_i, B_i. Round i serves a permutation of
B_{i-1} and A_i, so that every batch mixes the sequences of two shards, and no row is served twice or lost in between.
Permutations depend on (seed, i) alone: round i can be rebuilt from shards i-1 and i, whatever was served before, and a
run resumes with the very same batches from the pair (round, offset).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.harvest import ShardSource

__all__ = ["ShuffledActivations"]


EMPTY_ROUNDS = 16
"""Rounds without a row after which the text counts as one that has none."""


class ShuffledActivations:
    """Batches of exactly `batch_size` rows, {place: [batch_size, width]}, without end.

    rank, world: this process takes shards first + rank, first + rank + world, …, where first is 0 in a fresh run.
    """

    def __init__(self, shards: ShardSource, *, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1:
            raise TrimtabError(f"batch_size={batch_size!r} must be at least 1")
        self.shards = shards
        self.batch_size = batch_size
        self._seed = seed
        self._rank, self._world, self._first = rank, world, 0
        self._round, self._offset = 0, 0
        self._served = (0, 0)  # where the last whole batch ended: a batch may be interrupted half-way
        self._rows: dict[str, Tensor] | None = None
        self._kept: tuple[int, dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        served = self._round, self._offset
        try:
            return self._batch()
        except BaseException:  # a batch that an interrupt cut off was not served
            self._round, self._offset, self._rows = *served, None
            raise

    def _batch(self) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = []
        missing, fruitless = self.batch_size, 0
        while missing:
            rows = self._round_rows()
            part = {place: tensor[self._offset : self._offset + missing] for place, tensor in rows.items()}
            taken = len(next(iter(part.values())))
            fruitless = 0 if taken else fruitless + 1
            if fruitless > EMPTY_ROUNDS:
                raise TrimtabError("the text yields no activations: every token is special or an attention sink")
            parts.append(part)
            missing -= taken
            self._offset += taken
            if missing:
                self._round, self._offset, self._rows = self._round + 1, 0, None
        batch = {place: torch.cat([part[place] for part in parts]) for place in self.shards.places}
        self._served = (self._round, self._offset)
        return batch

    def peek(self) -> dict[str, Tensor]:
        """The rows of the present round, none of them served by this: enough to measure means and scales."""
        return self._round_rows()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the next row to be served, and where the text of its shards begins."""
        number, offset = self._served
        shard = self._shard_number(max(number - 1, 0))
        return {"round": number, "offset": offset, "first": self._first, "shards": self.shards.state(shard)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: the next batch is the one that would have followed."""
        self.shards.restore(state["shards"])
        self._round, self._offset = self._served = int(state["round"]), int(state["offset"])
        self._first = int(state["first"])
        self._rows, self._kept = None, None

    def go_on_after(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on after another number of processes, each of which left one of `states`.

        From the first shard on that none of them has touched: no row comes again, and what is left of the shards that
        were begun is left out.
        """
        self.shards.restore(states[-1]["shards"])
        begun = max(int(state["round"]) for state in states) + 1
        self._first = int(states[0]["first"]) + begun * len(states)
        self._round, self._offset = self._served = 0, 0
        self._rows, self._kept = None, None

    def _shard_number(self, index: int) -> int:
        """Of all shards, this process's `index`."""
        return self._first + index * self._world + self._rank

    def _round_rows(self) -> dict[str, Tensor]:
        if self._rows is None:
            parts = [self._half(self._round - 1, 1)] if self._round else []
            parts.append(self._half(self._round, 0))
            joined = {place: torch.cat([part[place] for part in parts]) for place in self.shards.places}
            self._rows = self._permuted(joined, 2 * self._round + 1)
        return self._rows

    def _half(self, index: int, half: int) -> dict[str, Tensor]:
        """Half A (0) or B (1) of this process's shard `index`."""
        if self._kept is None or self._kept[0] != index:
            shard = self.shards.shard(self._shard_number(index))
            self._kept = (index, self._permuted(shard, 2 * index))
        middle = len(next(iter(self._kept[1].values()))) // 2
        cut = slice(None, middle) if half == 0 else slice(middle, None)
        return {place: tensor[cut] for place, tensor in self._kept[1].items()}

    def _permuted(self, rows: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {self._rank} {number}".encode()).digest()[:8]) >> 1
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(next(iter(rows.values()))), generator=generator)
        return {place: tensor[order.to(tensor.device)] for place, tensor in rows.items()}
