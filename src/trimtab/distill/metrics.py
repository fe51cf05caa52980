"""What is logged of rollouts: means over the tokens of all processes, of what is learnt in parts.

A part is a rollout, or a micro-batch of the loss; a mean is that of all tokens since the last log, so that a part
counts by its tokens. `rollout/seconds` is the mean over rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RolloutMetrics"]

# What is logged of the processor's records.
_LOGGED = {
    "blend_weight": "rollout/blend_weight",
    "divergence": "rollout/kl_to_student",
    "student_entropy": "rollout/student_entropy",
    "teacher_entropy": "rollout/teacher_entropy",
    "teacher_log_prob": "rollout/teacher_log_prob",
}
# Known beforehand: a process may have nothing of what another has.
_NAMES = (*_LOGGED.values(), "rollout/share_student", "rollout/share_teacher", "rollout/seconds")


class RolloutMetrics:
    """Totals and counts of this process by name, until they are logged."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums = {name: [0.0, 0.0] for name in _NAMES}

    def add(self, name: str, total: float | Tensor, count: int | Tensor) -> None:
        self.sums[name][0] += float(total)
        self.sums[name][1] += float(count)

    def add_records(self, records: Mapping[str, Tensor]) -> None:
        """Of `TeacherGuided.records`, in which nan is no token."""
        for name, values in records.items():
            known = values[~values.isnan()]
            self.add(_LOGGED[name], known.sum(), known.numel())
            if name == "blend_weight":
                self.add("rollout/share_student", (known == 0).sum(), known.numel())
                self.add("rollout/share_teacher", (known == 1).sum(), known.numel())

    def log(self, accelerator: Any, metrics: Mapping[str, list[Any]]) -> None:
        """Append the means over all processes, each of which takes part, to `metrics`, and begin anew."""
        sums = torch.tensor([self.sums[name] for name in _NAMES], device=accelerator.device)
        for name, (total, count) in zip(_NAMES, accelerator.reduce(sums, "sum").tolist(), strict=True):
            if count:
                metrics[name].append(total / count)
        self.clear()
