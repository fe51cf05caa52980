"""What is measured of a batch equals the formulas on whole logits, and holds one row's distributions at a time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.align.measures import Comparison, compare, completion_log_probs

ROWS, LENGTH, VOCAB = 6, 40, 97


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).double().eval()


def batch(completion: int = 30) -> dict[str, Tensor]:
    """Rows of prompts of different lengths, the last positions of which are padding."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.arange(LENGTH - ROWS + 1, LENGTH + 1)[:, None]
    positions = torch.arange(LENGTH)[None]
    inside = positions < lengths
    return {
        "input_ids": torch.randint(VOCAB, (ROWS, LENGTH), generator=g),
        "attention_mask": inside.long(),
        "completion_mask": (inside & (positions >= lengths - completion)).long(),
    }


def compared(policy: Any, reference: Any, of: dict[str, Tensor]) -> Comparison:
    return compare(*(functools.partial(completion_log_probs, model) for model in (policy, reference)), of)


def test_row_by_row_is_the_formula_on_whole_batches() -> None:
    policy, reference, of = llama(0), llama(1), batch()
    found = compared(policy, reference, of)
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=of["input_ids"], attention_mask=of["attention_mask"]).logits[:, :-1].log_softmax(-1)
            for model in (policy, reference)
        )
    ids, mask = of["input_ids"][:, 1:, None], of["completion_mask"][:, 1:].bool()
    assert found.kl.dtype == torch.float64
    torch.testing.assert_close(found.mean_kl, (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean())
    for sums, log_probs in ((found.policy, log_p), (found.reference, log_q)):
        torch.testing.assert_close(sums, (log_probs.gather(-1, ids).squeeze(-1) * mask).sum(-1))
    assert torch.equal(found.log_ratios, found.policy - found.reference)
    assert torch.equal(found.tokens, mask.sum(-1))


class Largest(TorchDispatchMode):
    """The largest tensor that anything returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            self.numbers = max(self.numbers, each.numel() if isinstance(each, Tensor) else 0)
        return made


@pytest.mark.parametrize("completion", [30, 1])
def test_nothing_is_larger_than_one_rows_distributions(completion: int) -> None:
    policy, reference, of = llama(0), llama(1), batch(completion)
    with Largest() as largest:
        compared(policy, reference, of)
    assert VOCAB * (LENGTH - 1) <= largest.numbers <= VOCAB * LENGTH  # the model's own logits of a row


def test_a_model_is_at_no_distance_from_itself() -> None:
    found = compared(llama(0), llama(0), batch())
    assert float(found.mean_kl) == 0
    assert torch.equal(found.policy, found.reference)


def test_flips_are_changes_of_order_and_not_of_margin() -> None:
    policy = torch.tensor([-1.0, -5.0, -1.0, -9.0, -2.0, -3.0, -3.0, -4.0])  # chosen, then rejected
    reference = torch.tensor([-4.0, -2.0, -2.0, -8.0, -3.0, -3.0, -3.0, -4.0])
    found = Comparison(torch.zeros(8), policy, reference, torch.ones(8, dtype=torch.long))
    assert torch.equal(found.margins, torch.tensor([2.0, -3.0, 1.0, -1.0]))
    assert float(found.flips) == 2 / 4  # of the first two pairs; the last has a margin below 0 and keeps its order
