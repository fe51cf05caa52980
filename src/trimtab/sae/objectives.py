"""What a dictionary is trained to do with its sparse latents: losses on prefixes of a token's latents.

Sources: HierarchicalTopK, arXiv 2505.24473, section 3 (every prefix in order of value); Matryoshka, arXiv 2503.17547
(prefixes in order of index); Multi-TopK, Gao et al. 2024, arXiv 2406.04093, section 4.3 (the prefixes K and 4K).

Symbols: x [tokens, d] the target; (v_1, i_1), …, (v_K, i_K) a token's latents in the order of the objective; D the
decoder, b its bias; w_0, …, w_K >= 0 the prefixes' weights.

    x_hat_j = b + sum over t <= j of v_t D[i_t]                             prefix reconstruction
    L       = 1/(tokens d) sum over tokens and j of  w_j |x_hat_j - x|^2

    g_j     = 2 w_j (x_hat_j - x) / (tokens d),    S_t = sum over j >= t of g_j
    dL/dv_t = <D[i_t], S_t>,   dL/dD[l] = sum over (token, t) with i_t = l of v_t S_t
    dL/db   = sum over tokens of S_0 = - sum over tokens of dL/dx

All of them are one function, `prefix_loss`, with other weights:

    reconstruction      w_K = 1
    HierarchicalTopK    w_j = 1/|J| for j in J, by default every j of 1 … K; order of falling values
    Multi-TopK          w_k = 1, w_4k = 1/8; order of falling values
    Matryoshka          order of index; for each of M cuts q, w_j = 1/|M| at the j that counts the token's i_t < q

`prefix_loss_reference` is the specification, through a [tokens, K, d] tensor and autograd. The fast form goes through
blocks of tokens and, within them, of `RANKS` ranks: with r the error before a block and V its values, all its errors
are r + tril(V) D[i], one small matrix product, and all its S are the same product with the triangle turned over. No
tensor of tokens x K x d is held, and the gradient is found in the same pass as the loss. On a CUDA device the same is
one fused kernel of `trimtab.sae.triton_kernels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.errors import TrimtabError
from trimtab.sae import kernels
from trimtab.sae.encodings import Latents
from trimtab.sae.parallel import ALONE, Processes

__all__ = [
    "RECONSTRUCTION",
    "Hierarchical",
    "Matryoshka",
    "MultiTopK",
    "Objective",
    "ObjectiveGradients",
    "PrefixGradients",
    "hierarchical_topk_loss",
    "hierarchical_weights",
    "matryoshka_weights",
    "multi_topk_weights",
    "prefix_loss",
    "prefix_loss_and_gradients",
    "prefix_loss_reference",
]

# -- in a training step ----------------------------------------------------------------------------


class ObjectiveGradients(NamedTuple):
    """L_main, dL/d(values) in the order of the latents given, dL/d(x_hat) summed over prefixes, and t - x_hat."""

    loss: Float[Tensor, ""]
    d_values: Float[Tensor, "tokens k"]
    d_reconstruction: Float[Tensor, "tokens d"]
    residual: Float[Tensor, "tokens d"]


@runtime_checkable
class Objective(Protocol):
    """L_main of a dictionary in training."""

    def selected(self, k: int) -> int:
        """How many latents of a token it needs, for a dictionary that uses `k`."""

    def loss_and_gradients(
        self,
        latents: Latents,
        decoder: Tensor,
        decoder_bias: Tensor,
        target: Tensor,
        variance: float,
        d_decoder: Tensor,
        *,
        k: int,
        processes: Processes = ALONE,
    ) -> ObjectiveGradients:
        """L_main in units of `variance`, the total variance of the target; `d_decoder` is overwritten with dL/dD.

        k: what `selected` gave. processes: those that share the latents; those given are this one's.
        """


class _Reconstruction:
    """L_main = mean over tokens of |t - x_hat|^2 / V."""

    def selected(self, k: int) -> int:
        return k

    def loss_and_gradients(
        self,
        latents: Latents,
        decoder: Tensor,
        decoder_bias: Tensor,
        target: Tensor,
        variance: float,
        d_decoder: Tensor,
        *,
        k: int,
        processes: Processes = ALONE,
    ) -> ObjectiveGradients:
        mixed = processes.sum_of_shards(kernels.mix_rows(latents.values, latents.indices, decoder))
        residual = target - (mixed + decoder_bias)
        loss = residual.square().sum(-1).mean() / variance
        d_reconstruction = residual * (-2.0 / (len(target) * variance))
        kernels.add_outer(latents.values, latents.indices, d_reconstruction, d_decoder)
        d_values = kernels.row_products(d_reconstruction, decoder, latents.indices)
        return ObjectiveGradients(loss, d_values, d_reconstruction, residual)


RECONSTRUCTION = _Reconstruction()


class _Prefixes(ABC):
    """An objective on prefixes of a token's latents, in an order of its own."""

    def selected(self, k: int) -> int:
        return k

    @abstractmethod
    def ordered(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """The order of each token's latents [tokens, k], and the prefixes' weights w_0 … w_k."""

    def loss_and_gradients(
        self,
        latents: Latents,
        decoder: Tensor,
        decoder_bias: Tensor,
        target: Tensor,
        variance: float,
        d_decoder: Tensor,
        *,
        k: int,
        processes: Processes = ALONE,
    ) -> ObjectiveGradients:
        everyone, mine = processes.together(latents, len(decoder), k)
        order, weights = self.ordered(everyone)
        values, indices = (tensor.gather(-1, order) for tensor in everyone)
        weights = weights.to(values) * (target.shape[1] / variance)
        found = prefix_loss_and_gradients(
            values, indices, decoder, decoder_bias, target, weights, d_decoder=d_decoder.zero_(), processes=processes
        )
        d_values = torch.empty_like(values).scatter_(-1, order, found.d_values)
        if mine is not None:
            d_values = d_values.gather(-1, mine)
        return ObjectiveGradients(found.loss, d_values, found.d_reconstruction, target - found.reconstruction)


@dataclass(frozen=True)
class Hierarchical(_Prefixes):
    """HierarchicalTopK: prefixes `budgets` (None: every one up to k) with `weights` (None: equal ones)."""

    budgets: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def ordered(self, latents: Latents) -> tuple[Tensor, Tensor]:
        return _by_value(latents), hierarchical_weights(latents.values.shape[1], self.budgets, self.weights)


class MultiTopK(_Prefixes):
    """Multi-TopK: L(k) + L(4k) / 8; AuxK's residual is that of 4k latents."""

    def selected(self, k: int) -> int:
        return 4 * k

    def ordered(self, latents: Latents) -> tuple[Tensor, Tensor]:
        return _by_value(latents), multi_topk_weights(latents.values.shape[1] // 4)


@dataclass(frozen=True)
class Matryoshka(_Prefixes):
    """Prefixes of the dictionary of lengths `cuts`, with equal weights."""

    cuts: tuple[int, ...]

    def ordered(self, latents: Latents) -> tuple[Tensor, Tensor]:
        indices, order = latents.indices.sort(dim=-1, stable=True)
        return order, matryoshka_weights(indices, self.cuts)


def _by_value(latents: Latents) -> Tensor:
    return latents.values.argsort(dim=-1, descending=True, stable=True)


# -- on tensors ------------------------------------------------------------------------------------

RANKS = 8
"""Ranks of one block."""

BLOCK_ELEMENTS = 1 << 21
"""Entries of the decoder rows that are gathered at once: 8 MiB in float32. Their errors take as much again."""

GPU_BLOCK_ELEMENTS = 1 << 26
"""The same on other devices than a CPU, which have no cache to stay in, and wait for each call."""


def hierarchical_topk_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    budgets: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    *,
    assume_sorted: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens d"]]:
    """The loss of HierarchicalTopK, and the reconstruction from all K latents (which carries no gradient).

    For the latents of any library's dictionary: differentiable in `values`, `W_dec`, `b_dec` and `target`. Latents of
    one token may repeat an index. Equal values keep the order in which they come, as `torch.sort(stable=True)` does.

    Args:
        values, indices: [tokens, k], floating point and integers
        W_dec, b_dec, target: [n_latents, d], [d] and [tokens, d], floating point
        budgets: J, the prefixes that are trained, each of 1 … K and once; None for all of them
        weights: one for each of `budgets`, not negative; they are normalised to a sum of 1; None for equal ones
        assume_sorted: `values` fall along each row already

    Raises:
        TrimtabError: for budgets, weights, shapes, dtypes or indices other than these.
    """
    if values.ndim != 2:
        raise TrimtabError(f"values has shape {list(values.shape)}; accepted: [tokens, k]")
    prefix_weights = hierarchical_weights(values.shape[1], budgets, weights).to(values.device)
    if not assume_sorted:
        values, order = values.sort(dim=-1, descending=True, stable=True)
        indices = indices.gather(-1, order) if indices.shape == order.shape else indices
    return prefix_loss(values, indices, W_dec, b_dec, target, prefix_weights)


# -- weights ---------------------------------------------------------------------------------------


def hierarchical_weights(
    k: int, budgets: Sequence[int] | None = None, weights: Sequence[float] | None = None
) -> Float[Tensor, " k_plus_1"]:
    """w_0 … w_K in float64 of HierarchicalTopK over `budgets`, as `hierarchical_topk_loss` takes them."""
    chosen = list(range(1, k + 1)) if budgets is None else list(budgets)
    whole = all(isinstance(budget, Integral) and not isinstance(budget, bool) for budget in chosen)
    if not chosen or not whole or sorted({0, *chosen}) != [0, *chosen] or chosen[-1] > k:
        raise TrimtabError(f"budgets={budgets!r}; accepted: rising whole numbers of 1 to k={k}, at least one")
    each = torch.ones(len(chosen), dtype=torch.float64)
    if weights is not None:
        each = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
        if len(each) != len(chosen) or not (torch.isfinite(each) & (each >= 0)).all() or not each.sum() > 0:
            raise TrimtabError(
                f"weights={list(weights)!r}; accepted: {len(chosen)} numbers of 0 or more, not all 0: one for a budget"
            )
    found = torch.zeros(k + 1, dtype=torch.float64)
    found[torch.tensor(chosen)] = each / each.sum()
    return found


def multi_topk_weights(k: int) -> Float[Tensor, " k4_plus_1"]:
    """w_0 … w_4k of Multi-TopK: L(k) + L(4k) / 8. Latents are then selected with 4k."""
    found = torch.zeros(4 * k + 1, dtype=torch.float64)
    found[k], found[4 * k] = 1.0, 1 / 8
    return found


def matryoshka_weights(indices: Int[Tensor, "tokens k"], cuts: Sequence[int]) -> Float[Tensor, "tokens k_plus_1"]:
    """w_0 … w_K of each token whose latents come in order of index, for a Matryoshka loss with `cuts`, 1/|M| each."""
    limits = torch.tensor(list(cuts), device=indices.device).repeat(len(indices), 1)
    counts = torch.searchsorted(indices, limits)
    found = torch.zeros(len(indices), indices.shape[1] + 1, device=indices.device, dtype=torch.float64)
    return found.scatter_add_(1, counts, found.new_full(counts.shape, 1 / len(cuts)))


# -- the loss --------------------------------------------------------------------------------------


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
