"""The order of prompts, which a run that is taken up again in a later epoch finds anew.

TRL draws each epoch's order from one generator, one after the other. A resumed run begins with its epoch, so that the
orders of those before it must be drawn and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler

__all__ = ["InEpochs"]


class InEpochs(Sampler):
    """`sampler`, whose orders before that of the run's `epoch()` are passed over.

    The run is asked, since on several processes accelerate tells a loader of skipped batches no epoch.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], float | None]) -> None:
        self.sampler = sampler
        self.epoch = epoch
        self._begun = 0

    def __iter__(self) -> Iterator[int]:
        while self._begun < int(self.epoch() or 0):
            self._begun += 1
            next(iter(self.sampler))
        self._begun += 1
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)
