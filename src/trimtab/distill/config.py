"""Settings of `TRBTrainer`: TRL's of on-policy distillation, who writes the first rollouts, how the loss is computed.

Source: trust-region behaviour blending, arXiv 2605.31159. The paper's own settings are `learning_rate=1e-5`,
`lr_scheduler_type="constant_with_warmup"`, `warmup_steps=15`, `weight_decay=0.01`, `max_grad_norm=1.0`; here TRL's
defaults stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args, no_type_check

from trl import DistillationConfig

from trimtab.core.errors import TrimtabError, unknown
from trimtab.distill.functional import Estimator
from trimtab.distill.rollouts import TrustRegion, check_budget, check_whole

__all__ = ["TRBConfig"]


@dataclass
class TRBConfig(DistillationConfig):
    """`trl.DistillationConfig` with a trust region around the student for the first rollouts.

    The radius falls linearly from `trust_region_epsilon`, in nats per token, to 0 at optimiser step
    `trust_region_warmup_steps`; from then on, as with 0 of either, all is TRL's own. The paper tries 0.001 to 0.05 and
    15 to 50 of 400 steps.

    `temperature` is that of both models, in rollouts and in the loss.

    There is no estimator of the loss from the sampled token alone (log p - log q there): in the warm-up that token is
    not the student's sample, so that its mean would not be the divergence.

    Raises `TrimtabError` for settings out of range, and for a `beta` other than 1 together with an estimator other
    than "full": the truncated ones are of the reverse KL.
    """

    trust_region_epsilon: float = field(
        default=0.02,
        metadata={"help": "Nats per token by which rollouts may depart from the student, at the first step."},
    )
    trust_region_warmup_steps: int = field(
        default=50, metadata={"help": "Optimiser steps until the student writes alone."}
    )
    trust_region_schedule: str = field(
        default="linear",
        metadata={"help": "'linear' to 0, or 'constant' for good, a baseline.", "choices": ["linear", "constant"]},
    )
    loss_estimator: str = field(
        default="full",
        metadata={
            "help": "'full' is TRL's loss, or the same with stop ids made one; 'topk_renorm', 'topk_tail' and "
            "'topk_pg' are of the student's likeliest tokens (see trimtab.distill.functional).",
            "choices": list(get_args(Estimator)),
        },
    )
    loss_top_k: int = field(default=16, metadata={"help": "How many tokens the truncated estimators take."})
    student_stop_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Ids at which the student stops, the one that it should write first. Default: its own."},
    )
    teacher_stop_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Ids at which the teacher stops. Default: its generation config's and its tokenizer's."},
    )
    allow_padded_vocabulary: bool = field(
        default=False,
        metadata={"help": "Cut heads of different sizes to the tokenizer's, where one is padded further."},
    )
    offload_teacher: bool = field(
        default=False,
        metadata={"help": "Keep the teacher in the CPU's memory while the student alone writes rollouts."},
    )
    teacher_statistics: str = field(
        default="warmup",
        metadata={
            "help": "When to log the teacher's view of the rollouts: 'warmup', where it is known anyway, or 'always', "
            "at the price of one more projection.",
            "choices": ["warmup", "always"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("trust_region_epsilon", self.trust_region_epsilon)
        check_whole("trust_region_warmup_steps", self.trust_region_warmup_steps)
        check_whole("loss_top_k", self.loss_top_k, least=1)
        for name, accepted in (
            ("trust_region_schedule", ("linear", "constant")),
            ("loss_estimator", get_args(Estimator)),
            ("teacher_statistics", ("warmup", "always")),
        ):
            if getattr(self, name) not in accepted:
                raise unknown(name, getattr(self, name), accepted)
        if self.loss_estimator != "full" and self.beta != 1.0:
            raise TrimtabError(
                f"beta={self.beta} with loss_estimator={self.loss_estimator!r}: the truncated estimators are of the "
                "reverse KL, beta=1.0."
            )
        for name in ("student_stop_ids", "teacher_stop_ids"):
            ids = getattr(self, name)
            if ids is not None:
                if not (isinstance(ids, Sequence) and all(isinstance(token, int) for token in ids)):
                    raise TrimtabError(f"{name}={ids!r} must be a list of token ids.")
                setattr(self, name, list(ids))

    def trust_region(self) -> TrustRegion:
        """Who writes the rollouts."""
        return TrustRegion(self.trust_region_epsilon, self.trust_region_warmup_steps, self.trust_region_schedule)


# Most arguments are transformers', which takes whole numbers where it says float; the fields keep their types.
no_type_check(TRBConfig.__init__)
