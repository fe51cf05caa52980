"""How far a policy is from its references, on a batch of preferences or of sampled answers.

Symbols: pi the policy, ref a reference, t a position of a completion, h as in `trimtab.align.functional`:

    KL(pi || ref)    mean over t of sum_v pi_v (log pi_v - log ref_v)        at the batch's own prefixes, nats per token
    margin           mean over pairs of h, nats
    accuracy         share of pairs with h > 0: ordered as their labels are, by log pi - log ref
    flips            share of pairs that log pi orders otherwise than log ref does, whatever the labels

of online training, at the tokens y_t that an answer was sampled to have, with d = log ref(y_t) - log pi(y_t):

    KL(pi || ref)    mean over t of exp(d) - d - 1, in GRPO; of -d, in RLOO: each as TRL estimates it there

Those of preferences are not the divergence of whole answers that the policy would write, for which it must be sampled;
they are exact at the prefixes that training sees, and cost no sampling.

Rows are read one at a time, and of each the positions of its completion alone, so that no more than one row's
distributions are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.simplex import kl

__all__ = ["Batch", "Comparison", "compare", "completion_log_probs", "reward_kl_curve"]

Batch = Mapping[str, Tensor]
"""input_ids, attention_mask and completion_mask, each [rows, length]."""


class Comparison(NamedTuple):
    """A policy and a reference on the completions of a batch; sums over a completion's tokens, in nats."""

    kl: Float[Tensor, " rows"]
    policy: Float[Tensor, " rows"]
    reference: Float[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]

    @property
    def mean_kl(self) -> Tensor:
        """KL(pi || ref) per completion token."""
        return self.kl.sum() / self.tokens.sum()

    @property
    def log_ratios(self) -> Float[Tensor, " rows"]:
        """log pi(y|x) - log ref(y|x)."""
        return self.policy - self.reference

    @property
    def margins(self) -> Float[Tensor, " pairs"]:
        """h of each pair; the batch has the chosen completions first, then the rejected ones in the same order."""
        chosen, rejected = self.log_ratios.chunk(2)
        return chosen - rejected

    @property
    def flips(self) -> Tensor:
        """Share of pairs of which policy and reference do not find the same completion likelier."""
        by_policy, by_reference = (torch.sub(*log_probs.chunk(2)) > 0 for log_probs in (self.policy, self.reference))
        return (by_policy != by_reference).float().mean()


@torch.no_grad()
def completion_log_probs(model: Any, row: Batch) -> Float[Tensor, "tokens vocab"]:
    """What `model` says at the positions of the completion, in a batch of one row; float32 or better."""
    logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"], use_cache=False).logits
    picked = logits[0, :-1][row["completion_mask"][0, 1:].bool()]
    return picked.to(torch.promote_types(picked.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def compare(policy: Callable[[Batch], Tensor], reference: Callable[[Batch], Tensor], batch: Batch) -> Comparison:
    """Both read a batch of one row as `completion_log_probs` does; each reads every row of `batch` once."""
    found = []
    for index in range(len(batch["input_ids"])):
        row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        ids = row["input_ids"][0, 1:][row["completion_mask"][0, 1:].bool()]
        log_p, log_q = policy(row), reference(row)
        sums = [log_probs.gather(-1, ids[:, None]).sum() for log_probs in (log_p, log_q)]
        found.append((kl(log_p, log_q).sum(), *sums, torch.tensor(len(ids), device=ids.device)))
    return Comparison(*(torch.stack(part) for part in zip(*found, strict=True)))


def reward_kl_curve(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, KL from the initial reference, reward margin to it) of each log that has both: a picture's points.

    `log_history` is a trainer's `state.log_history`, of a run with `measure=True`.
    """
    names = ("reference/kl_initial", "reference/margin_initial")
    return [(log["step"], *(log[name] for name in names)) for log in log_history if all(name in log for name in names)]
