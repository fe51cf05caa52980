"""Logit lens: what a hidden state, or a direction in the residual stream, says in tokens.

With W_U [vocab, d_model] the unembedding and Norm_f the final norm, of scale gamma (Gemma's is 1 + its
weight):

    lens of a state h         all that the model does between its last block and its logits: W_U Norm_f(h),
    and biases, projections, Gemma's soft-capping where there are any lens of a direction v     W_U (gamma *
    v): centring and normalising are for states, a direction has no size

The state's lens (nostalgebraist 2020) runs the model's own code: a forward pass of one token in which h
takes the place of the last block's output. So it is right for every architecture whose blocks are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.activations.anatomy import Site, n_layers, sites
from trimtab.core.errors import TrimtabError

__all__ = ["direction_lens", "direction_tokens", "logit_lens", "top_tokens"]

# Numbers in the logits of one piece: 128 MiB in float32, for each copy that the model's tail makes of them.
_LOGITS_PER_PIECE = 2**25


@torch.no_grad()
def logit_lens(model: nn.Module, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """The logits that `states` would give as the last block's output, in the model's dtype; no gradient.

    For the last block's output ("resid.L-1") these are the model's logits. For an encoder its masked-LM
    head is the way to logits. Besides the result, memory does not grow with the number of states. Raises
    `TrimtabError` for a model without an unembedding, an encoder-decoder model, and states that are none or
    of another width.
    """
    size = _piece(_head(model))
    last = _last_block(model)
    rows = states.reshape(-1, states.shape[-1])
    if rows.numel() == 0:
        raise TrimtabError(f"states has shape {list(states.shape)}: at least one state is needed.")
    parts = (_tail(model, last, piece) for piece in rows.split(size))
    first = next(parts)
    # Filled piece by piece: a concatenation at the end would hold everything twice.
    logits = first.new_empty(len(rows), first.shape[-1])
    for start, part in zip(range(0, len(rows), size), chain([first], parts), strict=True):
        logits[start : start + size] = part
    return logits.reshape(*states.shape[:-1], -1)


@torch.no_grad()
def direction_lens(
    model: nn.Module, directions: Float[Tensor, "directions d_model"]
) -> Float[Tensor, "directions vocab"]:
    """W_U (gamma * v) for each direction v, in the dtype of W_U; no bias, no soft-capping, no gradient.

    gamma is 1 where no norm takes the last block's output. An encoder's masked-LM head is read through its
    decoder matrix alone: the dense layer before it is left out. The result grows with the number of
    directions; for thousands of them there is `direction_tokens`. Raises `TrimtabError` for a model without
    an unembedding or with a quantised one, an encoder-decoder model, a final norm that is no scale, and
    directions of another width.
    """
    return _direction_reader(model, directions.shape[-1])(directions)


@torch.no_grad()
def direction_tokens(
    model: nn.Module, tokenizer: Any, directions: Float[Tensor, "directions d_model"], n: int
) -> list[list[tuple[str, float]]]:
    """`top_tokens` of `direction_lens`, in pieces: [directions, vocab] is never held as a whole."""
    read = _direction_reader(model, directions.shape[-1])
    pieces = directions.split(_piece(_head(model)))
    return [tokens for piece in pieces for tokens in top_tokens(read(piece), tokenizer, n)]


def top_tokens(logits: Float[Tensor, "rows vocab"], tokenizer: Any, n: int) -> list[list[tuple[str, float]]]:
    """For each row its `n` largest logits, largest first, as pairs of the token's text and the logit.

    Where the unembedding is padded beyond the tokenizer's vocabulary, the padding is left out. Raises
    `TrimtabError` unless 1 <= n <= number of tokens, and for NaN.
    """
    vocab = min(logits.shape[-1], len(tokenizer))
    if not 1 <= n <= vocab:
        raise TrimtabError(f"n={n} must lie between 1 and {vocab}, the number of tokens.")
    values, ids = logits[:, :vocab].float().topk(n, dim=-1)
    bad = values.isnan().any(-1)
    if bool(bad.any()):
        raise TrimtabError(f"logits has NaN in row {int(bad.nonzero()[0])}.")
    return [
        [(tokenizer.decode([token]), value) for token, value in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def _head(model: Any) -> Any:
    """The unembedding: the module whose weight is W_U."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TrimtabError(f"model={name} is an encoder-decoder model: the lens reads one stream of blocks.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TrimtabError(
            f"model={name} has no unembedding. Accepted: a model with a causal or masked language-model head."
        )
    return head


def _piece(head: Any) -> int:
    return max(1, _LOGITS_PER_PIECE // len(head.weight))


def _last_block(model: nn.Module) -> Site:
    (site,) = sites(model, f"resid.{n_layers(model) - 1}")
    return site


@contextmanager
def _replaced_output(site: Site, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context `function` of the block's output takes its place, be it longer or shorter.

    `activations.edit` asks for the same shape, as other blocks would; after the last one each position is
    alone.
    """
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        # A block that runs several times (ALBERT's) is the last one only in its last run.
        if site.call is not None and calls <= site.call:
            return output
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    handle = site.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _run_one_token(model: Any) -> Any:
    device = model.get_input_embeddings().weight.device
    return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))


def _tail(model: nn.Module, last: Site, states: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
    def replace(output: Tensor) -> Tensor:
        if output.shape[-1] != states.shape[-1]:
            raise TrimtabError(f"states has width {states.shape[-1]}: the model's is {output.shape[-1]}.")
        return states.unsqueeze(0).to(output)

    with _replaced_output(last, replace):
        logits: Tensor = _run_one_token(model).logits
    return logits.reshape(len(states), -1)


def _direction_reader(model: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
    weight = _head(model).weight
    if not weight.is_floating_point():
        raise TrimtabError(f"model has an unembedding of dtype {weight.dtype}: it must be floating-point.")
    if width != weight.shape[1]:
        raise TrimtabError(f"directions has width {width}: the unembedding takes {weight.shape[1]}.")
    scale = _final_scale(model)

    def read(piece: Tensor) -> Tensor:
        scaled = piece.to(weight.device) * scale.to(device=weight.device, dtype=piece.dtype)
        return functional.linear(scaled.to(weight.dtype), weight)

    return read


def _final_scale(model: nn.Module) -> Tensor:
    """gamma of the norm that takes the last block's output, or 1 if something else takes it."""
    norm = _first_after_last_block(model)
    weight = norm.weight
    if weight.ndim != 1:
        return torch.ones(())
    # What the norm does to a vector of mean 0 and mean square 1 tells whether it scales by w or, as Gemma's
    # does, by 1 + w; the difference to the mirrored vector is free of the bias.
    probe = torch.linspace(-1, 1, len(weight), device=weight.device)
    probe = (probe / probe.square().mean().sqrt()).to(weight.dtype)
    response = (norm(probe) - norm(-probe)).float() / 2
    for scale in (weight.float(), 1 + weight.float()):
        if torch.allclose(response, scale * probe.float(), rtol=0.02, atol=0.02):
            return scale
    kind = type(norm).__name__
    raise TrimtabError(f"model has a final {kind} that scales neither by its weight nor by 1 + weight.")


def _first_after_last_block(model: nn.Module) -> Any:
    """The first module with a weight that runs after the last block."""
    is_after, found = False, []

    def passed(output: Tensor) -> Tensor:
        nonlocal is_after
        is_after = True
        return output

    def note(module: nn.Module, args: Any) -> None:
        if is_after:
            found.append(module)

    weighted = [module for module in model.modules() if isinstance(getattr(module, "weight", None), Tensor)]
    handles = [module.register_forward_pre_hook(note) for module in weighted]
    try:
        with _replaced_output(_last_block(model), passed):
            _run_one_token(model)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]
