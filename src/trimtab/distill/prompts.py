"""The order of prompts, which a run that is taken up again in a later epoch finds anew.

TRL draws each epoch's order from one generator, one after the other. A resumed run begins with its epoch, so that the
orders of those before it must be drawn and passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

__all__ = ["InEpochs"]


class InEpochs(Sampler):
    """`sampler`, whose n-th iteration is that of epoch n: `set_epoch`, which trainers call, passes over the others."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self._begun = 0

    def set_epoch(self, epoch: int) -> None:
        while self._begun < epoch:
            next(iter(self))

    def __iter__(self) -> Iterator[int]:
        self._begun += 1
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)
