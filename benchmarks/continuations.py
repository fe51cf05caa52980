"""Continuations that a causal model writes, and exact divergences of two models along them.

    per sequence   sum_t KL(p_t || q_t)  over the answer's tokens up to its first stop, p_t and q_t over the vocabulary

Where the answers are p's own samples, the mean over answers is an unbiased estimate of KL(P || Q) of whole answers,
and one of less variance than log P - log Q: every step's expectation is taken exactly (Rao-Blackwell).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.simplex import kl

__all__ = ["Continuations", "answer_log_probs", "divergences", "given", "log_probs", "sample", "texts"]

ROWS = 8
"""Rows a forward pass: float32 logits of 8 x 24 x 262,144 take 200 MB."""


@dataclass(frozen=True)
class Continuations:
    """Prompts padded on the left and answers padded on the right: ids and mask [rows, prompt + answer]."""

    ids: Tensor
    mask: Tensor
    answer_length: int

    @property
    def answers(self) -> Tensor:
        return self.ids[:, -self.answer_length :]

    @property
    def answer_mask(self) -> Tensor:
        return self.mask[:, -self.answer_length :].bool()

    def parts(self, rows: int = ROWS) -> Iterator[Continuations]:
        for start in range(0, len(self.ids), rows):
            part = slice(start, start + rows)
            yield Continuations(self.ids[part], self.mask[part], self.answer_length)


def sample(
    model: Any, prompts: Sequence[Sequence[int]], stops: Sequence[int], *, new_tokens: int, seed: int, rows: int = 32
) -> Continuations:
    """What `model` goes on with at temperature 1, `new_tokens` at most; the global generator is left as it was."""
    length = max(len(prompt) for prompt in prompts)
    written = []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), rows):
            ids, mask = _padded_left(prompts[start : start + rows], length)
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                eos_token_id=list(stops),
                pad_token_id=0,
            )
            written.append(torch.nn.functional.pad(made, (0, length + new_tokens - made.shape[1])))
    model.train(training)
    ids = torch.cat(written)
    answers = ids[:, length:]
    stopped = torch.isin(answers, torch.tensor(list(stops)))
    before = stopped.long().cumsum(-1) - stopped.long()
    _, mask = _padded_left(prompts, length)
    return Continuations(ids, torch.cat([mask, (before == 0).long()], 1), new_tokens)


def given(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Continuations:
    """Answers that stand already."""
    ids, mask = _padded_left(prompts, max(len(prompt) for prompt in prompts))
    length = max(len(answer) for answer in answers)
    right = torch.zeros(len(answers), length, dtype=torch.long)
    right_mask = torch.zeros_like(right)
    for row, answer in enumerate(answers):
        right[row, : len(answer)] = torch.tensor(answer)
        right_mask[row, : len(answer)] = 1
    return Continuations(torch.cat([ids, right], 1), torch.cat([mask, right_mask], 1), length)


def texts(continuations: Continuations, tokenizer: Any) -> list[str]:
    """The answers as text, each to the end of its first line."""
    rows = zip(continuations.answers, continuations.answer_mask, strict=True)
    decoded = (tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows)
    return [text.split("\n")[0] for text in decoded]


def log_probs(model: Any, continuations: Continuations) -> Tensor:
    """log p of every token at each place of the answers: [rows, answer, vocab]."""
    logits = model(
        input_ids=continuations.ids,
        attention_mask=continuations.mask,
        logits_to_keep=continuations.answer_length + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def answer_log_probs(model: Any, continuations: Continuations) -> Tensor:
    """log p of each answer, [rows]: the sum over its tokens."""
    found = []
    for part in continuations.parts():
        own = log_probs(model, part).gather(-1, part.answers[..., None])[..., 0]
        found.append(own.masked_fill(~part.answer_mask, 0).sum(-1))
    return torch.cat(found)


@torch.no_grad()
def divergences(
    first: Any, second: Any, continuations: Continuations, *, second_context: Any = nullcontext
) -> tuple[Tensor, Tensor]:
    """KL(first || second) and KL(second || first) summed along each answer: [rows] each.

    `second_context()` is entered where the second model runs, such as what switches an adapter off.
    """
    forward, backward = [], []
    for part in continuations.parts():
        log_p = log_probs(first, part)
        context: AbstractContextManager[Any] = second_context()
        with context:
            log_q = log_probs(second, part)
        forward.append(kl(log_p, log_q).masked_fill(~part.answer_mask, 0).sum(-1))
        backward.append(kl(log_q, log_p).masked_fill(~part.answer_mask, 0).sum(-1))
    return torch.cat(forward), torch.cat(backward)


def _padded_left(prompts: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask
