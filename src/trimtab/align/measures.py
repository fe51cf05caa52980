"""How far a policy is from its references, on a batch of preferences.

Symbols: pi the policy, ref a reference, t a position of a completion, h as in `trimtab.align.functional`:

    KL(pi || ref)    mean over t of sum_v pi_v (log pi_v - log ref_v)        at the batch's own prefixes, nats per token
    margin           mean over pairs of h, nats
    flips            share of pairs whose order by log pi - log ref is not that of the labels

These are not the divergence of whole answers that the policy would write, for which it must be sampled; they are exact
at the prefixes that training sees, and cost no sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.simplex import kl

__all__ = ["Readings", "log_ratios", "mean_kl", "read", "reward_kl_curve"]

Readings = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities [batch, positions, vocab], ids of the next tokens and a mask of completions [batch, positions]."""


@torch.no_grad()
def read(model: Any, batch: Mapping[str, Tensor]) -> Readings:
    """What `model` says of a batch with input_ids, attention_mask and completion_mask, each [batch, length]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1), batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()


def mean_kl(policy: Readings, reference: Readings) -> Tensor:
    """KL(pi || ref) per completion token."""
    mask = policy[2]
    return kl(policy[0][mask], reference[0][mask]).mean()


def log_ratios(policy: Readings, reference: Readings) -> Tensor:
    """log pi(y|x) - log ref(y|x) of each row, summed over the completion's tokens."""
    _, ids, mask = policy
    policy_log_probs, reference_log_probs = (
        (log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * mask).sum(-1) for log_probs in (policy[0], reference[0])
    )
    return policy_log_probs - reference_log_probs


def reward_kl_curve(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, KL from the initial reference, reward margin to it) of each log that has both: a picture's points.

    `log_history` is a trainer's `state.log_history`, of a run with `measure=True`.
    """
    names = ("reference/kl_initial", "reference/margin_initial")
    return [(log["step"], *(log[name] for name in names)) for log in log_history if all(name in log for name in names)]
