"""Measures of texts: perplexity under a model, distinct-n, attribute rate under a pluggable scorer.

perplexity       exp(sum of -log p(token | what precedes it) / number of tokens), all texts together
distinct-n       different n-grams / all n-grams (Li et al., arXiv 1510.03055)
attribute rate   share of the texts whose score is at least a threshold (DExperts, arXiv 2105.03023: 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.errors import TrimtabError, unknown

__all__ = ["attribute_rate", "distinct_n", "perplexity", "token_nats"]


def perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8, context: int = 512
) -> float:
    """Perplexity of `texts` under a causal language model: exp of the mean over all their tokens, in nats.

    What is scored, and what is raised, `token_nats` says; the mean over texts of each text's own perplexity
    comes from there too. Raises `TrimtabError` also when no text has a token to score.
    """
    counted = token_nats(model, tokenizer, texts, batch_size=batch_size, context=context)
    tokens = sum(count for _, count in counted)
    if tokens == 0:
        raise TrimtabError(f"texts has {len(texts)} texts and no token to score: all are empty or too short.")
    return math.exp(math.fsum(nats for nats, _ in counted) / tokens)


def token_nats(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8, context: int = 512
) -> list[tuple[float, int]]:
    """For each text the sum of -log p(token | what precedes it) in nats, and the number of tokens in the sum.

    A text is tokenised without special tokens and preceded by the tokenizer's BOS, so that its first token
    is scored as well; BOS and padding never are. Without a BOS the first token of a text is not scored. A
    text longer than `context` is read in windows of `context` tokens, each starting with BOS, or without
    one with the last token of the window before: each token is scored once, on the window's tokens before
    it. The model runs in evaluation mode, and `batch_size` windows at a time, whose logits [batch_size,
    context, vocab] must fit.

    Raises `TrimtabError` for no texts, `batch_size` < 1, a `context` below 2 or beyond the model's
    positions, a model that is no causal language model, and NaN in its logits.
    """
    _check_texts(texts)
    if batch_size < 1:
        raise TrimtabError(f"batch_size={batch_size} must be at least 1.")
    _check_causal(model, context)
    windows = [(index, window) for index, text in enumerate(texts) for window in _windows(tokenizer, text, context)]
    # Windows of like length together: the less padding.
    windows.sort(key=lambda item: len(item[1]))
    nats = [0.0] * len(texts)
    tokens = [0] * len(texts)
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            sums = _window_nats(model, [window for _, window in batch])
            for (index, window), value in zip(batch, sums, strict=True):
                if math.isnan(value):
                    raise TrimtabError(f"model gives NaN logits for texts[{index}].")
                nats[index] += value
                tokens[index] += len(window) - 1
    return list(zip(nats, tokens, strict=True))


def distinct_n(
    texts: Sequence[str] | Sequence[Sequence[Hashable]],
    n: int,
    *,
    denominator: str = "ngrams",
) -> float:
    """Different n-grams over all n-grams of `texts`, in [0, 1]; no n-gram crosses from one text to the next.

    A text is a string, split at white space, or a sequence of tokens or token ids. `denominator="tokens"`
    divides by the number of tokens instead, as DExperts' evaluation and CAIF do. 0 where the denominator is
    0. To average over prompts, call it once for the continuations of each. Raises `TrimtabError` for no
    texts and n < 1.
    """
    _check_texts(texts)
    if n < 1:
        raise TrimtabError(f"n={n} must be at least 1.")
    if denominator not in ("ngrams", "tokens"):
        raise unknown("denominator", denominator, ("ngrams", "tokens"))
    rows = [text.split() if isinstance(text, str) else list(text) for text in texts]
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    total = len(ngrams) if denominator == "ngrams" else sum(len(row) for row in rows)
    return len(set(ngrams)) / total if total else 0.0


def attribute_rate(
    texts: Sequence[str],
    scorer: Callable[[list[str]], Sequence[float | bool] | Tensor],
    *,
    threshold: float | int = 0.5,
) -> float:
    """Share of `texts` that `scorer` gives a score of at least `threshold`.

    `scorer` takes all texts as one list and returns a score for each, such as a classifier's probability of
    the attribute, or True and False. Raises `TrimtabError` for no texts, a threshold or a score that is
    NaN, and another number of scores than of texts.
    """
    _check_texts(texts)
    if math.isnan(threshold):
        raise TrimtabError(f"threshold={threshold} must be a number.")
    scores = [float(score) for score in scorer(list(texts))]
    if len(scores) != len(texts):
        raise TrimtabError(f"scorer returned {len(scores)} scores for {len(texts)} texts.")
    missing = [index for index, score in enumerate(scores) if math.isnan(score)]
    if missing:
        raise TrimtabError(f"scorer returned NaN for texts[{missing[0]}].")
    return sum(score >= threshold for score in scores) / len(scores)


def _check_texts(texts: Sequence[Any]) -> None:
    if isinstance(texts, str):
        raise TrimtabError(f"texts={texts[:40]!r} is one string: a list of texts is accepted.")
    if not len(texts):
        raise TrimtabError("texts is empty: at least one text is needed.")


def _check_causal(model: Any, context: int) -> None:
    name = type(model).__name__
    config = getattr(model, "config", None)
    can_generate = hasattr(model, "can_generate") and model.can_generate()
    if config is None or not can_generate or getattr(config, "is_encoder_decoder", False):
        raise TrimtabError(f"model={name} is no causal language model: its perplexity is not defined.")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if not 2 <= context <= positions:
        raise TrimtabError(f"context={context} must lie between 2 and the model's {positions} positions.")


def _windows(tokenizer: Any, text: str, context: int) -> Iterator[list[int]]:
    """Token lists of at most `context`; all but the first token of each are to be scored."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None:
        yield from ([bos, *ids[start : start + context - 1]] for start in range(0, len(ids), context - 1))
    else:
        yield from (ids[start : start + context] for start in range(0, len(ids) - 1, context - 1))


def _window_nats(model: Any, windows: list[list[int]]) -> list[float]:
    """Nats of each window's tokens but the first; padded on the right, where a causal model cannot look."""
    device = model.get_input_embeddings().weight.device
    length = max(len(window) for window in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    # Row by row: float32 logits of the whole batch would be a second [batch_size, context, vocab].
    return [
        float(
            functional.cross_entropy(
                logits[row, : len(window) - 1].float(),
                torch.tensor(window[1:], device=logits.device),
                reduction="sum",
            )
        )
        for row, window in enumerate(windows)
    ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context, and each module's own mode again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
