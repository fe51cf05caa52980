"""The products of `trimtab.sae.kernels` and the prefix loss of `trimtab.sae.prefixes` in Triton, for CUDA devices.

Own work throughout; what is computed is HierarchicalTopK's fused loss (arXiv 2505.24473, section 3) for any prefix
weights, in the symbols of `prefixes`, and the sparse products in those of `kernels`. Any number of tokens, of latents
a token, of latents and any width d; float32, bfloat16 or float16, all sums in float32. Callers use the functions of the
other two modules, which come here by themselves: `kernels.triton_forms` says when.

    mix_rows, row_products   one program a token and slice of d; a token and eight ranks
    add_outer                the (latent, token) pairs are sorted; one program sums up to `PIECE` pairs of one latent,
                             and a latent with more has its pieces added in order: no atomics, the same bits every time
    prefix loss              one program a token and slice of d walks the ranks up with the running error
                             e_t = x_hat_t - x, then down again with S_t = S_{t+1} + 2 w_t e_t:
                             dL/dv_t = <D[i_t], S_t>, D's gradient += v_t S_t (atomics: its last bits vary between
                             runs), e_{t-1} = e_t - v_t D[i_t]
    top_columns              the k tiles of a row with the largest maxima hold its k largest entries

On the way down e_t is recomputed by subtraction, in float32 whatever the dtypes: after K ranks it is off by about K
roundings, 1e-5 of the largest prefix at K = 256. Kernels are compiled for dtypes and tile sizes, not for each number
of tokens; tile sizes follow from d alone, so that equal inputs give equal sums.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["add_outer", "mix_rows", "prefix_loss_and_gradients", "row_products", "top_columns"]

PIECE = 512
"""Pairs of one latent that one program sums: a latent that every token uses is spread over many."""

FEW = 64
"""Rows of at least so many times k entries are searched tile by tile; `torch.topk` has the shorter ones."""


def mix_rows(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], weight: Float[Tensor, "n_latents d"]
) -> Float[Tensor, "tokens d"]:
    """`out[t] = sum_j values[t, j] weight[indices[t, j]]`, differentiable in `values` and `weight`."""
    mixed: Tensor = _MixRows.apply(values, indices, weight)
    return mixed


class _MixRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        (tokens, k), d = indices.shape, weight.shape[1]
        out = weight.new_empty(tokens, d)
        block = _block(d, 256)
        operands = (values.contiguous(), indices.contiguous(), weight.contiguous(), out)
        _launch(_mix_kernel, (tokens, triton.cdiv(d, block)), *operands, k, d, ENTRIES=4, BLOCK=block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        values, indices, weight = ctx.saved_tensors
        (g,) = gradients
        d_values = row_products(g, weight, indices).to(values.dtype) if ctx.needs_input_grad[0] else None
        d_weight = add_outer(values, indices, g, torch.empty_like(weight)) if ctx.needs_input_grad[2] else None
        return d_values, None, d_weight


def row_products(
    g: Float[Tensor, "tokens d"], weight: Float[Tensor, "n_latents d"], indices: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """`out[t, j] = <weight[indices[t, j]], g[t]>`."""
    (tokens, k), d = indices.shape, weight.shape[1]
    out = g.new_empty(tokens, k)
    operands = (g.contiguous(), weight.contiguous(), indices.contiguous(), out)
    _launch(_row_products_kernel, (tokens, triton.cdiv(k, 8)), *operands, k, d, RANKS=8, BLOCK=128)
    return out


def add_outer(
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    out: Float[Tensor, "n_latents d"],
    *,
    accumulate: bool = False,
) -> Float[Tensor, "n_latents d"]:
    """`out[f] = sum over (t, j) with indices[t, j] = f of values[t, j] x[t]`, added to `out` with `accumulate`."""
    (n_latents, d), k = out.shape, indices.shape[1]
    latents, order = indices.reshape(-1).int().sort(stable=True)
    limits = torch.arange(n_latents + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(latents, limits)
    # A latent of n pairs has n // PIECE further pieces, the last of them perhaps empty. `ends` counts them up to each
    # latent and with it, `owner` names the latent of each (n_latents: no such piece). Nothing waits for the device.
    ends = starts.diff().div(PIECE, rounding_mode="floor").cumsum(0)
    further = len(order) // PIECE
    owner = torch.searchsorted(ends, torch.arange(further, device=x.device), right=True)
    pieces = x.new_empty(further, d, dtype=torch.float32)
    block = _block(d, 256)
    slices = triton.cdiv(d, block)
    pairs = (values.reshape(-1)[order], order.div(k, rounding_mode="floor"), x.contiguous())
    cuts = (starts, ends, owner, pieces, out, n_latents, d, *out.stride())
    _launch(
        _segments_kernel, (n_latents + further, slices), *pairs, *cuts,
        ACCUMULATE=accumulate, PIECE=PIECE, ENTRIES=4, BLOCK=block,
    )  # fmt: skip
    if further:
        _launch(_pieces_kernel, (further, slices), *cuts[1:], BLOCK=block)
    return out


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, x_hat_K, dL/dv and dL/dx_hat, as `prefixes.prefix_loss_and_gradients`; `d_decoder` likewise."""
    (tokens, k), d = values.shape, decoder.shape[1]
    block = _block(d, 512)
    slices = triton.cdiv(d, block)
    weights = (weights.float() / (tokens * d)).contiguous()
    reconstruction = decoder.new_empty(tokens, d, dtype=torch.float32)
    losses = reconstruction.new_empty(tokens, slices)
    # What is not asked for is empty, and the kernel does not touch it.
    d_values = reconstruction.new_empty((slices, tokens, k) if with_gradients else 0)
    d_reconstruction = torch.empty_like(reconstruction) if with_gradients else reconstruction.new_empty(0)
    into = reconstruction.new_empty(0, 0) if d_decoder is None else d_decoder
    read = (values, indices, decoder, decoder_bias, target, weights)
    written = (reconstruction, losses, d_values, d_reconstruction, into)
    _launch(
        _prefix_kernel, (tokens, slices), *(tensor.contiguous() for tensor in read), *written,
        tokens, k, d, k + 1 if weights.ndim == 2 else 0, *into.stride(),
        GRADIENTS=with_gradients, INTO_DECODER=with_gradients and d_decoder is not None, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return losses.sum(), reconstruction, d_values.sum(0) if with_gradients else d_values, d_reconstruction


def top_columns(product: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest entries of each row, unsorted, and their columns (int64); NaN counts as the largest, as in torch.

    Exact. With k tiles chosen by their maxima, no entry elsewhere exceeds the least of these, and k entries are not
    below it: the maxima themselves. So the row is read once, and `torch.topk` sees n / T maxima and k T entries in
    place of n, fewest for T = sqrt(n / k); its own radix selection reads every row several times.
    """
    rows, n = product.shape
    if n < FEW * k:
        top = product.topk(k, dim=-1, sorted=False)
        return top.values, top.indices
    product = product.contiguous()
    width = max(16, 2 ** round(math.log2(n / k) / 2))
    tiles = triton.cdiv(n, width)
    group = max(1, 2048 // width)
    maxima = product.new_empty(rows, tiles)
    _launch(_maxima_kernel, (rows, triton.cdiv(tiles, group)), product, maxima, n, tiles, TILES=group, WIDTH=width)
    chosen = maxima.topk(k, dim=-1, sorted=False).indices
    entries = product.new_empty(rows, k * width)
    _launch(_entries_kernel, (rows, triton.cdiv(k, group)), product, chosen, entries, n, k, TILES=group, WIDTH=width)
    values, places = entries.topk(k, dim=-1, sorted=False)
    columns = chosen.gather(-1, places.div(width, rounding_mode="floor")) * width + places % width
    # Only entries of -inf can lose to the last tile's padding; they need a column of the row all the same.
    return values, columns.clamp_(max=n - 1)


# -- launching -------------------------------------------------------------------------------------


def _block(d: int, most: int) -> int:
    """The slice of d that one program has: of the powers of two from 128 to `most` that pad d least, the widest."""
    blocks = [128 << i for i in range((most // 128).bit_length())]
    return min(blocks, key=lambda block: (triton.cdiv(d, block) * block, -block))


def _launch(kernel: Any, grid: tuple[int, int], *operands: Any, **constants: Any) -> None:
    """Triton launches on the current device; the tensors, the first operand among them, may lie on another."""
    with torch.cuda.device_of(operands[0]):
        kernel[grid](*operands, **constants)


# -- kernels ---------------------------------------------------------------------------------------
# Triton reads their source, so that no run-time type checker may wrap them: hence `no_type_check`.


@triton.jit
@no_type_check
def _weighted_sum(values, rows, matrix, begin, end, columns, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over begin <= e < end of values[e] matrix[rows[e], columns]."""
    total = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        some = entry < end
        value = tl.load(values + entry, mask=some, other=0.0).to(tl.float32)
        row = tl.load(rows + entry, mask=some, other=0).to(tl.int64)
        inside = some[:, None] & (columns < d)[None, :]
        tile = tl.load(matrix + row[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value[:, None] * tile
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _mix_kernel(values, indices, weight, out, k, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mixed = _weighted_sum(values, indices, weight, token * k, token * k + k, columns, d, ENTRIES, BLOCK)
    tl.store(out + token * d + columns, mixed, mask=columns < d)


@triton.jit
@no_type_check
def _row_products_kernel(g, weight, indices, out, k, d, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    row = tl.load(indices + token * k + rank, mask=rank < k, other=0).to(tl.int64)
    total = tl.zeros([RANKS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (rank < k)[:, None] & (columns < d)[None, :]
        tile = tl.load(weight + row[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tile * tl.load(g + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
    tl.store(out + token * k + rank, tl.sum(total, 1), mask=rank < k)


@triton.jit
@no_type_check
def _segments_kernel(
    values, tokens, x, starts, ends, owner, pieces, out, n_latents, d, out_row, out_column,
    ACCUMULATE: tl.constexpr, PIECE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs below n_latents: the first piece of each latent, into `out`. The others: the further pieces."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < n_latents:
        latent = program.to(tl.int64)
        begin = tl.load(starts + latent)
        end = tl.minimum(begin + PIECE, tl.load(starts + latent + 1))
        total = _weighted_sum(values, tokens, x, begin, end, columns, d, ENTRIES, BLOCK)
        at = out + latent * out_row + columns.to(tl.int64) * out_column
        if ACCUMULATE:
            total += tl.load(at, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(at, total, mask=columns < d)
    else:
        piece = (program - n_latents).to(tl.int64)
        latent = tl.load(owner + piece)
        if latent < n_latents:
            number = 1 + piece - tl.load(ends + latent - 1, mask=latent > 0, other=0)
            begin = tl.load(starts + latent) + number * PIECE
            end = tl.minimum(begin + PIECE, tl.load(starts + latent + 1))
            total = _weighted_sum(values, tokens, x, begin, end, columns, d, ENTRIES, BLOCK)
            tl.store(pieces + piece * d + columns, total, mask=columns < d)


@triton.jit
@no_type_check
def _pieces_kernel(ends, owner, pieces, out, n_latents, d, out_row, out_column, BLOCK: tl.constexpr):
    """The program of a latent's first further piece adds all of them to `out`."""
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(owner + piece)
    if latent < n_latents:
        before = tl.load(ends + latent - 1, mask=latent > 0, other=0)
        if piece == before:
            at = out + latent * out_row + columns.to(tl.int64) * out_column
            total = tl.load(at, mask=columns < d, other=0.0).to(tl.float32)
            for one in range(before, tl.load(ends + latent)):
                total += tl.load(pieces + one * d + columns, mask=columns < d, other=0.0)
            tl.store(at, total, mask=columns < d)


@triton.jit
@no_type_check
def _prefix_kernel(
    values, indices, decoder, bias, target, weights, reconstruction, losses, d_values, d_reconstruction, d_decoder,
    tokens, k, d, weights_row, d_decoder_row, d_decoder_column,
    GRADIENTS: tl.constexpr, INTO_DECODER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slice_of_d = tl.program_id(1)
    columns = slice_of_d * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    values += token * k
    indices += token * k
    weights += token * weights_row
    wanted = tl.load(target + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32) - wanted
    error = first
    squares = tl.load(weights) * first * first
    for t in tl.range(k, loop_unroll_factor=4):  # so that four rows are under way at once
        row = tl.load(decoder + tl.load(indices + t).to(tl.int64) * d + columns, mask=inside, other=0.0).to(tl.float32)
        error += tl.load(values + t).to(tl.float32) * row
        squares += tl.load(weights + t + 1) * error * error
    tl.store(reconstruction + token * d + columns, error + wanted, mask=inside)
    tl.store(losses + token * tl.num_programs(1) + slice_of_d, tl.sum(squares, 0))
    if GRADIENTS:
        d_values += (slice_of_d.to(tl.int64) * tokens + token) * k
        after = tl.zeros([BLOCK], tl.float32)  # S_t
        earlier = tl.load(indices + k - 1).to(tl.int64)
        row_of_earlier = tl.load(decoder + earlier * d + columns, mask=inside, other=0.0).to(tl.float32)
        for step in range(k):
            t = k - 1 - step
            latent, row = earlier, row_of_earlier
            # The next row is asked for before this one's atomics, which no load may pass.
            earlier = tl.load(indices + tl.maximum(t - 1, 0)).to(tl.int64)
            row_of_earlier = tl.load(decoder + earlier * d + columns, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(values + t).to(tl.float32)
            after += 2 * tl.load(weights + t + 1) * error
            tl.store(d_values + t, tl.sum(row * after, 0))
            if INTO_DECODER:  # noqa: SIM102
                if value != 0:  # slots without a latent may all name one index, and would queue there
                    at = d_decoder + latent * d_decoder_row + columns.to(tl.int64) * d_decoder_column
                    tl.atomic_add(at, value * after, mask=inside, sem="relaxed")
            error -= value * row
        after += 2 * tl.load(weights) * first
        tl.store(d_reconstruction + token * d + columns, after, mask=inside)


@triton.jit
@no_type_check
def _maxima_kernel(product, maxima, n, tiles, TILES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    entry = tl.load(product + row * n + columns, mask=columns < n, other=float("-inf")).to(tl.float32)
    entry = tl.where(entry != entry, float("inf"), entry)
    tl.store(maxima + row * tiles + tile, tl.max(entry, 1), mask=tile < tiles)


@triton.jit
@no_type_check
def _entries_kernel(product, chosen, entries, n, k, TILES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * TILES + tl.arange(0, TILES)
    within = tl.arange(0, WIDTH)[None, :]
    columns = tl.load(chosen + row * k + slot, mask=slot < k, other=0)[:, None] * WIDTH + within
    inside = (slot < k)[:, None]
    entry = tl.load(product + row * n + columns, mask=inside & (columns < n), other=float("-inf"))
    tl.store(entries + row * k * WIDTH + slot[:, None] * WIDTH + within, entry, mask=inside)
