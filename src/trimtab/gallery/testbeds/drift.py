"""Students whose answers drift into junk, for experiments with on-policy distillation: two beds with exact answers.

Each prompt has one right answer, and what a writer is worth is known without sampling: the probability of writing it
whole, prod_t p(right_t | right_<t), averaged over prompts.

    Chains     one answer of 40 tokens. A writer is a table of logits, a row for each position; a wrong token drops it
               into one more row, from which nothing leads back and where the teacher babbles as well
    Answers    8 prompts with answers of 20 tokens and an end. A writer is a GRU whose first state is the prompt's. The
               student has learnt from text in which every token may begin junk that does not stop, the teacher from
               text that hardly does

Writers are stacked: one for each seed, and copies of it side by side, train in one set of tensors [*runs, ...].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = ["Answers", "Bed", "Chains", "Recurrent", "Table", "Writer"]

AnyWriter = TypeVar("AnyWriter", bound="Writer")
SYMBOLS, JUNK = 12, 12
"""Of Answers: tokens that stand in them, and tokens that stand in junk alone; behind them comes the end."""
BATCH, RATE = 64, 3e-3
"""Of Answers: how both models have learnt."""


@dataclass(frozen=True)
class Writer(ABC):
    """Stacked autoregressive models, decoded by hand. The rows of a run are (copies, prompts).

    Fields are tensors with the runs in front; the floating-point ones are trained.
    """

    @abstractmethod
    def begin(self, copies: int) -> Any:
        """The state before the first token, each prompt `copies` times."""

    @abstractmethod
    def logits(self, state: Any) -> Float[Tensor, "*runs rows vocab"]:
        """Logits of the next token."""

    @abstractmethod
    def advance(self, state: Any, tokens: Int[Tensor, "*runs rows"]) -> Any:
        """The state after `tokens`."""

    def parameters(self) -> list[Tensor]:
        """The tensors that are trained."""
        return [tensor for tensor in self._tensors().values() if tensor.is_floating_point()]

    def copies(self: AnyWriter, n: int) -> AnyWriter:
        """Of runs [seeds], `n` copies of each, to be trained apart: runs [seeds, n]."""
        tensors = {
            name: tensor.detach().unsqueeze(1).repeat_interleave(n, 1).requires_grad_(tensor.is_floating_point())
            for name, tensor in self._tensors().items()
        }
        return replace(self, **tensors)

    def follow(self, tokens: Int[Tensor, "*runs rows length"], copies: int = 1) -> Float[Tensor, "*runs rows length v"]:
        """Log-probabilities at every prefix of `tokens`, whose rows are (copies, prompts)."""
        state, found = self.begin(copies), []
        for token in tokens.unbind(-1):
            found.append(self.logits(state))
            state = self.advance(state, token)
        return torch.stack(found, -2).log_softmax(-1)

    def exact(self, right: Int[Tensor, "*runs prompts length"]) -> Float[Tensor, "*runs"]:
        """The probability of writing the whole of a prompt's right answer, averaged over prompts."""
        return self.follow(right).gather(-1, right.unsqueeze(-1)).squeeze(-1).sum(-1).exp().mean(-1)

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Table(Writer):
    """A row of logits for each position of the one `right` answer, and a last row for all that comes after a slip.

    A state is the row.
    """

    table: Float[Tensor, "*runs rows vocab"]
    right: Int[Tensor, "*runs length"]

    def begin(self, copies: int) -> Tensor:
        return self.right.new_zeros((*self.right.shape[:-1], copies))

    def logits(self, state: Tensor) -> Tensor:
        return torch.take_along_dim(self.table, state.unsqueeze(-1), -2)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        off = self.right.shape[-1]
        # Off the track, and behind the end, any token does: the row stays the last.
        expected = torch.take_along_dim(self.right, state.clamp_max(off - 1), -1)
        return torch.where((state < off) & (tokens == expected), state + 1, off)


@dataclass(frozen=True)
class Recurrent(Writer):
    """A GRU as in torch (the reset gate behind the recurrent product), whose first state is the prompt's.

        x = embedding[token] W + b,   u = h U + c,   in thirds for the gates r, z, n
        r = sigmoid(x_r + u_r),  z = sigmoid(x_z + u_z),  n = tanh(x_n + r u_n),  h' = (1 - z) n + z h
        logits = h V + v

    A state is h and, as they are wanted at every token, the x of the whole vocabulary.
    """

    prompts: Float[Tensor, "*runs prompts d"]
    embedding: Float[Tensor, "*runs vocab d"]
    W: Float[Tensor, "*runs d gates"]
    b: Float[Tensor, "*runs 1 gates"]
    U: Float[Tensor, "*runs d gates"]
    c: Float[Tensor, "*runs 1 gates"]
    V: Float[Tensor, "*runs d vocab"]
    v: Float[Tensor, "*runs 1 vocab"]

    def begin(self, copies: int) -> tuple[Tensor, Tensor]:
        once = (1,) * (self.prompts.ndim - 2)
        return self.prompts.repeat(*once, copies, 1), self.embedding @ self.W + self.b

    def logits(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0] @ self.V + self.v

    def advance(self, state: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
        h, inputs = state
        x_r, x_z, x_n = (F.one_hot(tokens, inputs.shape[-2]).to(h.dtype) @ inputs).chunk(3, -1)
        u_r, u_z, u_n = (h @ self.U + self.c).chunk(3, -1)
        new = (x_n + (x_r + u_r).sigmoid() * u_n).tanh()
        return torch.lerp(new, h, (x_z + u_z).sigmoid()), inputs

    @classmethod
    def draw(cls, generators: Sequence[torch.Generator], prompts: int, vocab: int, d: int) -> Recurrent:
        """Untrained ones, a run for each generator: normal prompts and embeddings, else uniform within d^-1/2."""

        def normal(*shape: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).requires_grad_()

        def uniform(*shape: int) -> Tensor:
            drawn = [(2 * torch.rand(shape, generator=g) - 1) / d**0.5 for g in generators]
            return torch.stack(drawn).requires_grad_()

        return cls(
            normal(prompts, d),
            normal(vocab, d),
            *(uniform(*shape) for shape in ((d, 3 * d), (1, 3 * d), (d, 3 * d), (1, 3 * d), (d, vocab), (1, vocab))),
        )


@dataclass(frozen=True)
class Bed(ABC):
    """For each of `seeds` a student to be taught, its teacher, and what is right; `rollouts` answers a prompt and step.

    Both writers have the runs [seeds].
    """

    seeds: tuple[int, ...]
    student: Writer
    teacher: Writer
    right: Int[Tensor, "seeds prompts length"]
    rollouts: int

    @abstractmethod
    def written(self, tokens: Int[Tensor, "seeds *runs rows length"]) -> Bool[Tensor, "seeds *runs rows length"]:
        """Where tokens belong to the answer: up to its end, and with it."""

    @abstractmethod
    def junk(self, tokens: Int[Tensor, "seeds *runs rows length"]) -> Bool[Tensor, "seeds *runs rows length"]:
        """Where tokens are junk."""


class Chains(Bed):
    """Answers have one length, and all behind a wrong token is junk."""

    @classmethod
    def draw(cls, seeds: Sequence[int], *, length: int = 40, vocab: int = 12, rollouts: int = 16) -> Chains:
        """The student is right with about 0.88 a token, the teacher with 0.998.

        Logits are N(0, 1/4), and log 99 (the teacher: 8.5) more on the right token; the last row is N(0, 1/4) for both.
        Raises TrimtabError for no seed.
        """
        drawn = []
        for g in _generators(seeds):
            right = torch.randint(vocab, (length,), generator=g)
            tables = 0.5 * torch.randn(2, length + 1, vocab, generator=g)
            for table, lead in zip(tables, (math.log(99), 8.5), strict=True):
                table[torch.arange(length), right] += lead
            drawn.append((right, *tables))
        right, student, teacher = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return cls(tuple(seeds), Table(student, right), Table(teacher, right), right[:, None], rollouts)

    def written(self, tokens: Tensor) -> Tensor:
        return torch.ones_like(tokens, dtype=torch.bool)

    def junk(self, tokens: Tensor) -> Tensor:
        right = self.right.reshape(len(self.seeds), *(1,) * (tokens.ndim - 2), -1)
        return _later(tokens != right)


class Answers(Bed):
    """Answers stop at the end token, and junk has tokens of its own."""

    @classmethod
    def draw(
        cls,
        seeds: Sequence[int],
        *,
        prompts: int = 8,
        length: int = 20,
        student_d: int = 48,
        teacher_d: int = 96,
        student_steps: int = 500,
        teacher_steps: int = 250,
    ) -> Answers:
        """Random answers, and a teacher and a student trained on text made from them: two or three seconds a seed.

        In a text each token begins junk with probability 0.002 for the teacher and 0.08 for the student, and all behind
        it is junk; in the student's, 4 % of the symbols are drawn anew besides. Adam at 3e-3, batches of 64. Raises
        TrimtabError for no seed.
        """
        generators = _generators(seeds)
        end = SYMBOLS + JUNK
        symbols = torch.stack([torch.randint(SYMBOLS, (prompts, length), generator=g) for g in generators])
        right = torch.cat([symbols, torch.full_like(symbols[..., :1], end)], -1)
        teacher = Recurrent.draw(generators, prompts, end + 1, teacher_d)
        student = Recurrent.draw(generators, prompts, end + 1, student_d)
        _fit(teacher, generators, right, teacher_steps, drift=0.002, noise=0.0)
        _fit(student, generators, right, student_steps, drift=0.08, noise=0.04)
        return cls(tuple(seeds), student, teacher, right, 1)

    def written(self, tokens: Tensor) -> Tensor:
        return ~_later(tokens == SYMBOLS + JUNK)

    def junk(self, tokens: Tensor) -> Tensor:
        return (tokens >= SYMBOLS) & (tokens < SYMBOLS + JUNK)


def text(
    right: Int[Tensor, "prompts length"], g: torch.Generator, copies: int, *, drift: float, noise: float
) -> Int[Tensor, "rows length"]:
    """Each prompt's answer `copies` times; a token begins junk with probability `drift`, is drawn anew with `noise`."""
    right = right.repeat(copies, 1)
    drawn = torch.randint(SYMBOLS, right.shape, generator=g)
    anew = (torch.rand(right.shape, generator=g) < noise) & (right < SYMBOLS)
    junk = torch.randint(SYMBOLS, SYMBOLS + JUNK, right.shape, generator=g)
    adrift = (torch.rand(right.shape, generator=g) < drift).cumsum(-1) > 0
    return torch.where(adrift, junk, torch.where(anew, drawn, right))


def _fit(
    writer: Recurrent,
    generators: Sequence[torch.Generator],
    right: Int[Tensor, "seeds prompts length"],
    steps: int,
    *,
    drift: float,
    noise: float,
) -> None:
    """Train on fresh text by cross-entropy."""
    optimizer = torch.optim.Adam(writer.parameters(), lr=RATE)
    copies = max(1, BATCH // right.shape[1])
    for _ in range(steps):
        drawn = [text(each, g, copies, drift=drift, noise=noise) for each, g in zip(right, generators, strict=True)]
        tokens = torch.stack(drawn)
        loss = -writer.follow(tokens, copies).gather(-1, tokens.unsqueeze(-1)).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in writer.parameters():
        parameter.requires_grad_(False)


def _later(flags: Bool[Tensor, "*rows length"]) -> Bool[Tensor, "*rows length"]:
    """Where an earlier token of the row is flagged."""
    return flags.cumsum(-1) > flags.long()


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    if not seeds:
        raise TrimtabError("seeds is empty: one or more are accepted.")
    return [torch.Generator().manual_seed(seed) for seed in seeds]
