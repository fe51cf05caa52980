"""The loss on prefixes of a token's latents, of which every objective of `trimtab.sae.objectives` is a case.

Source: HierarchicalTopK, arXiv 2505.24473, section 3, for any weights.

Symbols: x [tokens, d] the target; (v_1, i_1), …, (v_K, i_K) a token's latents in some order; D the decoder, b its bias;
w_0, …, w_K >= 0 the prefixes' weights.

    x_hat_j = b + sum over t <= j of v_t D[i_t]                             prefix reconstruction
    L       = 1/(tokens d) sum over tokens and j of  w_j |x_hat_j - x|^2

    g_j     = 2 w_j (x_hat_j - x) / (tokens d),    S_t = sum over j >= t of g_j
    dL/dv_t = <D[i_t], S_t>,   dL/dD[l] = sum over (token, t) with i_t = l of v_t S_t
    dL/db   = sum over tokens of S_0 = - sum over tokens of dL/dx

`prefix_loss_reference` is the specification, through a [tokens, K, d] tensor and autograd. The fast form goes through
blocks of tokens and, within them, of `RANKS` ranks: with r the error before a block and V its values, all its errors
are r + tril(V) D[i], one small matrix product, and all its S are the same product with the triangle turned over. No
tensor of tokens x K x d is held, and the gradient is found in the same pass as the loss. On a CUDA device the same is
one fused kernel of `trimtab.sae.triton_kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.errors import TrimtabError
from trimtab.sae import kernels
from trimtab.sae.parallel import ALONE, Processes

__all__ = ["PrefixGradients", "prefix_loss", "prefix_loss_and_gradients", "prefix_loss_reference"]

RANKS = 8
"""Ranks of one block."""

BLOCK_ELEMENTS = 1 << 21
"""Entries of the decoder rows that are gathered at once: 8 MiB in float32. Their errors take as much again."""

GPU_BLOCK_ELEMENTS = 1 << 26
"""The same on other devices than a CPU, which have no cache to stay in, and wait for each call."""


def prefix_loss(
    values: Tensor, indices: Tensor, decoder: Tensor, decoder_bias: Tensor, target: Tensor, weights: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens d"]]:
    """L of the module's docstring, and x_hat_K without gradient; latents in the order given.

    Shapes are those of `hierarchical_topk_loss`; weights: w_0 … w_K, for all tokens [K + 1] or for each
    [tokens, K + 1]; no gradient goes there. Sums are in float32 at least, whatever the dtype of the tensors.
    Raises TrimtabError for tensors that do not fit.
    """
    _check(values, indices, decoder, decoder_bias, target, weights)
    tensors = (values, decoder, decoder_bias, target)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    loss, reconstruction = _PrefixLoss.apply(values, indices, decoder, decoder_bias, target, weights, wanted)
    return loss, reconstruction


class _PrefixLoss(torch.autograd.Function):
    """The gradient is found in the forward pass, where the decoder rows are at hand, and scaled in the backward one."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        decoder: Tensor,
        bias: Tensor,
        target: Tensor,
        weights: Tensor,
        wanted: bool,
    ) -> Any:
        wide = torch.promote_types(decoder.dtype, torch.float32)
        into_decoder = wanted and decoder.requires_grad
        d_decoder = torch.zeros(decoder.shape, dtype=wide, device=decoder.device) if into_decoder else None
        with torch.autocast(decoder.device.type, enabled=False):
            found = prefix_loss_and_gradients(
                values, indices, decoder, bias, target, weights, d_decoder=d_decoder, with_gradients=wanted
            )
        ctx.save_for_backward(found.d_values, d_decoder, found.d_reconstruction)
        ctx.dtypes = (values.dtype, decoder.dtype, bias.dtype, target.dtype)
        ctx.mark_non_differentiable(found.reconstruction)
        return found.loss, found.reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        d_values, d_decoder, d_reconstruction = ctx.saved_tensors
        upstream = gradients[0]
        found = (
            d_values,
            d_decoder,
            d_reconstruction.sum(0) if ctx.needs_input_grad[3] else None,
            -d_reconstruction if ctx.needs_input_grad[4] else None,
        )
        d_values, d_decoder, d_bias, d_target = (
            (upstream * gradient).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return d_values, None, d_decoder, d_bias, d_target, None, None


class PrefixGradients(NamedTuple):
    """L, x_hat_K, dL/dv and S_0 = dL/dx_hat of each token (the last two empty where they were not asked for)."""

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, "tokens d"]
    d_values: Tensor
    d_reconstruction: Tensor


@torch.no_grad()
def prefix_loss_and_gradients(
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    decoder: Float[Tensor, "n_latents d"],
    decoder_bias: Float[Tensor, " d"],
    target: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "*tokens k_plus_1"],
    *,
    d_decoder: Float[Tensor, "n_latents d"] | None = None,
    with_gradients: bool = True,
    processes: Processes = ALONE,
) -> PrefixGradients:
    """L and its gradients, block by block of tokens; dL/dD is added to `d_decoder` where that is given.

    Tokens are taken in their order, so that on a CPU the result does not depend on the number of threads. On a CUDA
    device one fused Triton kernel does it all, unless `kernels.triton_forms`, the wish for determinism or a decoder
    that several processes hold forbids it.
    processes: those that hold the decoder together: `decoder` and `d_decoder` have this one's rows, while latents,
        target and what is returned are the same for all.
    """
    triton = kernels.triton_forms(decoder) if processes.shards == 1 else None
    if triton is not None and (d_decoder is None or not torch.are_deterministic_algorithms_enabled()):
        fused = triton.prefix_loss_and_gradients(
            values, indices, decoder, decoder_bias, target, weights, d_decoder=d_decoder, with_gradients=with_gradients
        )
        return PrefixGradients(*fused)
    tokens, k = values.shape
    d = decoder.shape[1]
    wide = torch.promote_types(decoder.dtype, torch.float32)
    values, weights = values.to(wide), weights.to(wide) / (tokens * d)
    first = decoder_bias.to(wide) - target.to(wide)  # the error before any latent
    last = torch.empty_like(first)  # that after all
    loss = values.new_zeros(())
    d_values = torch.empty_like(values) if with_gradients else values.new_empty(0)
    d_reconstruction = torch.empty_like(first) if with_gradients else values.new_empty(0)
    elements = BLOCK_ELEMENTS if decoder.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = min(max(1, elements // (k * d)), tokens)
    ranks = [slice(a, min(a + RANKS, k)) for a in range(0, k, RANKS)]
    # Matrices of one block of ranks lie together: a product into part of a larger tensor would be taken one by one.
    buffers = [decoder.new_empty(2, step * (r.stop - r.start), d, dtype=wide) for r in ranks]
    sums = decoder.new_empty(step * min(RANKS, k), d, dtype=wide)
    for start in range(0, tokens, step):
        block = slice(start, min(start + step, tokens))
        n = block.stop - block.start
        v, flat = values[block], [indices[block, r].reshape(-1).long() for r in ranks]
        w = weights[block] if weights.ndim == 2 else weights.expand(n, -1)
        rows, errors, error = [], [], first[block]
        for r, index, buffer in zip(ranks, flat, buffers, strict=True):
            gathered, found = (part[: len(index)].view(n, -1, d) for part in buffer)
            processes.rows(decoder, index, buffer[0, : len(index)])
            torch.baddbmm(error[:, None], torch.tril(_repeated(v[:, r])), gathered, out=found)
            squares = torch.linalg.vector_norm(found, dim=-1).square()
            loss += (w[:, r.start + 1 : r.stop + 1] * squares).sum()
            error = found[:, -1]
            rows.append(gathered)
            errors.append(found)
        last[block] = error
        loss += (w[:, 0] * first[block].square().sum(-1)).sum()
        if not with_gradients:
            continue
        after = torch.zeros_like(error)
        for r, index, gathered, found in reversed(list(zip(ranks, flat, rows, errors, strict=True))):
            suffix = sums[: len(index)].view(n, -1, d)
            coefficients = 2 * w[:, r.start + 1 : r.stop + 1]
            torch.baddbmm(after[:, None], torch.triu(_repeated(coefficients)), found, out=suffix)
            after = suffix[:, 0].clone()
            d_values[block, r] = torch.mul(gathered, suffix, out=found).sum(-1)
            if d_decoder is not None:
                local, share = processes.own(index, v[:, r].reshape(-1), len(decoder))
                d_decoder.index_add_(0, local, suffix.view(-1, d).mul_(share[:, None]))
        d_reconstruction[block] = after + 2 * w[:, :1] * first[block]
    return PrefixGradients(loss, last + target.to(wide), d_values, d_reconstruction)


def _repeated(values: Tensor) -> Tensor:
    """[n, R, R] whose every row is the token's R values; its triangles, times R rows, are running sums of them."""
    return values[:, None, :].expand(-1, values.shape[1], -1)


def prefix_loss_reference(
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    decoder: Float[Tensor, "n_latents d"],
    decoder_bias: Float[Tensor, " d"],
    target: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "*tokens k_plus_1"],
) -> Float[Tensor, ""]:
    """L through all prefix reconstructions at once, differentiated by autograd: what the fast form is held against."""
    contributions = values[..., None] * decoder[indices.long()]
    prefixes = torch.cat([torch.zeros_like(contributions[:, :1]), contributions.cumsum(1)], 1) + decoder_bias
    return (weights * (prefixes - target[:, None]).square().sum(-1)).sum() / target.numel()


def _check(
    values: Tensor, indices: Tensor, decoder: Tensor, decoder_bias: Tensor, target: Tensor, weights: Tensor
) -> None:
    tokens, k = values.shape
    n_latents, d = decoder.shape
    if not tokens or not k:
        raise TrimtabError(f"values has shape {list(values.shape)}; accepted: one token or more, one latent or more")
    for name, tensor, shape in (
        ("indices", indices, [tokens, k]),
        ("b_dec", decoder_bias, [d]),
        ("target", target, [tokens, d]),
    ):
        if list(tensor.shape) != shape:
            raise TrimtabError(f"{name} has shape {list(tensor.shape)}; values and W_dec ask for {shape}")
    if weights.shape[-1] != k + 1 or weights.ndim > 2 or (weights.ndim == 2 and len(weights) != tokens):
        raise TrimtabError(f"weights has shape {list(weights.shape)}; accepted: [{k + 1}] or [{tokens}, {k + 1}]")
    for name, tensor in (("values", values), ("W_dec", decoder), ("b_dec", decoder_bias), ("target", target)):
        if not tensor.is_floating_point():
            raise TrimtabError(f"{name} has dtype {tensor.dtype}; accepted: floating point")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise TrimtabError(f"indices has dtype {indices.dtype}; accepted: integers")
    if k > n_latents:
        raise TrimtabError(f"values has {k} latents a token; the dictionary has n_latents={n_latents}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= n_latents:
        raise TrimtabError(f"indices run from {low} to {high}; accepted: 0 to {n_latents - 1}")
