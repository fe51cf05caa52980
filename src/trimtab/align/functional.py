"""Preference losses against a reference that may move, and how it moves, on plain tensors.

Source: "Learn Your Reference Model for Real Good Alignment", arXiv 2404.09656. The losses are those of DPO (arXiv
2305.18290), IPO (2310.12036) and KTO (2402.01306); the update is the method.

Symbols: a log-ratio d = log pi(y|x) - log pi_ref(y|x), in nats, summed over the completion's tokens; w the chosen, l
the rejected completion; h = d_w - d_l; z an estimate of KL(pi || pi_ref).

    DPO     -log sigmoid(beta h)                              gradient in h: -beta sigmoid(-beta h)
    IPO     (h - 1 / (2 beta))^2                              with lengths, each d is divided by its own
    KTO     lambda_D (1 - sigmoid(beta (d - z)))              of a desirable completion
            lambda_U (1 - sigmoid(beta (z - d)))              of an undesirable one
            z = max(0, mean over mismatched pairs of d)       without gradient

    reference <- alpha policy + (1 - alpha) reference         alpha = 1: an exact copy

All losses are elementwise over broadcast shapes, and means are left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.core.errors import TrimtabError

__all__ = ["dpo_loss", "ipo_loss", "kto_kl", "kto_loss", "trust_region_lerp_"]


def dpo_loss(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float | int) -> Tensor:
    """-log sigmoid(beta h) of each pair. Raises `TrimtabError` for a `beta` that is not positive and finite."""
    _check_beta(beta)
    return -logsigmoid(beta * (chosen_log_ratio - rejected_log_ratio))


def ipo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float | int,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """(h - 1 / (2 beta))^2 of each pair, least at h = 1 / (2 beta).

    The paper's form has sums over tokens; with both lengths (completion tokens, at least 1) log-ratios are means, as
    IPO's authors advise and TRL computes. Raises `TrimtabError` for a `beta` that is not positive and finite, and for
    one length alone.
    """
    _check_beta(beta)
    if (chosen_length is None) != (rejected_length is None):
        raise TrimtabError("chosen_length and rejected_length: both are given, or neither.")
    if chosen_length is not None and rejected_length is not None:
        chosen_log_ratio, rejected_log_ratio = chosen_log_ratio / chosen_length, rejected_log_ratio / rejected_length
    return (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)) ** 2


def kto_kl(mismatched_log_ratio: Tensor, dim: int = -1) -> Tensor:
    """z: the mean log-ratio of completions put to other prompts, over `dim`, at least 0; it carries no gradient."""
    return mismatched_log_ratio.detach().mean(dim).clamp_min(0)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float | int,
    desirable_weight: float | int = 1.0,
    undesirable_weight: float | int = 1.0,
) -> Tensor:
    """The loss of each completion: `desirable` is boolean, `kl` is z of its batch (`kto_kl`).

    Raises `TrimtabError` for a `beta` that is not positive and finite.
    """
    _check_beta(beta)
    gain = beta * (log_ratio - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


@torch.no_grad()
def trust_region_lerp_(
    reference: Tensor | Sequence[Tensor], policy: Tensor | Sequence[Tensor], policy_weight: float | int
) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place and without gradient; alpha is `policy_weight`.

    It weights the *policy*: one minus the decay of an exponential moving average. 1 copies exactly, in any dtype.
    Tensors of one pair have one shape; shards of one layout are updated shard by shard. A reference in half precision
    loses updates smaller than half its spacing: keep a float32 copy and cast it (`TrustRegionReference` does).

    Raises `TrimtabError` for a weight outside (0, 1], and for lists or shapes that differ.
    """
    if not 0 < policy_weight <= 1:
        raise TrimtabError(f"policy_weight={policy_weight} must lie in (0, 1]: it is the policy's share.")
    targets = [reference] if isinstance(reference, Tensor) else list(reference)
    sources = [policy] if isinstance(policy, Tensor) else list(policy)
    if [t.shape for t in targets] != [s.shape for s in sources]:
        raise TrimtabError(
            f"reference and policy have shapes {_shapes(targets)} and {_shapes(sources)}: they must be equal."
        )
    if not targets:
        return
    if policy_weight == 1:
        torch._foreach_copy_(targets, sources)
        return
    pairs = list(zip(targets, sources, strict=True))
    alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
    if alike:
        torch._foreach_lerp_([target for target, _ in alike], [source for _, source in alike], policy_weight)
    for target, source in pairs:
        if target.dtype != source.dtype:  # one at a time: all at once would be another policy in memory
            target.lerp_(source.to(target.dtype), policy_weight)


def _check_beta(beta: float | int) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise TrimtabError(f"beta={beta} must be positive and finite.")


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]
