"""The four products that a sparse dictionary spends its time in, each without a dense [tokens, latents] gradient.

With a weight `W` [n_latents, d] whose rows are latents, and for each token k latent indices `i_j` and values `v_j`:

    top_products   the k largest entries of  x W^T + bias                           (encoder and TopK)
    row_products   p_j = <W[i_j], g>                                                (values' gradient)
    mix_rows       y   = sum_j v_j W[i_j]                                           (decoder)
    add_outer      G[f] += sum over tokens and j with i_j = f of  v_j x             (weights' gradient)

`top_products` works through blocks of tokens, so that the product is never held whole. `row_products` is a sampled
matrix product and `add_outer` a sparse-dense product over the transposed pattern; both write into memory that the
caller may keep from step to step, since the pages of a fresh 40 MiB gradient cost ten times the arithmetic.

Each has two forms with equal results and gradients: plain PyTorch, for any device and dtype, which is what is written
here; and Triton, in `trimtab.sae.triton_kernels`, which the functions take by themselves where `triton_forms` says so.
`trimtab.sae.functional` is written on top of them and is the place where formulas live.

The Triton forms of these four give the same bits for the same input. What adds in no fixed order on a CUDA device is
the decoder's gradient of a prefix loss (`trimtab.sae.prefixes`) and the gradient of the encoder's bias. As everywhere
in PyTorch, `torch.use_deterministic_algorithms(True)` is the switch: the prefix loss then takes its PyTorch form, and
PyTorch another way to sum. (cuBLAS asks for CUBLAS_WORKSPACE_CONFIG=:4096:8 besides.)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Precision", "add_outer", "candidates", "mix_rows", "row_products", "top_products", "triton_forms"]

Precision = Literal["float32", "screened", "bfloat16"]

BLOCK_ELEMENTS = 1 << 24
"""Entries of the encoder's product that are held at once: 64 MiB in float32."""

SCREENING_MARGIN = 1.5
"""With `precision="screened"`, how many times k candidates the bfloat16 product proposes."""

HAS_TRITON = importlib.util.find_spec("triton") is not None and os.environ.get("TRIMTAB_TRITON", "1") != "0"


def triton_forms(tensor: Tensor) -> ModuleType | None:
    """`trimtab.sae.triton_kernels` if it is to work on tensors like this one: on CUDA, 32 bits at most; else None."""
    if not (HAS_TRITON and tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)):
        return None
    from trimtab.sae import triton_kernels  # not before: importing Triton takes its time

    return triton_kernels


def top_products(
    x: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "n_latents d"],
    bias: Float[Tensor, " n_latents"],
    k: int,
    *,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest entries of each row of `x weight^T + bias`, unsorted, and their columns (int64).

    precision:
        "float32"   the product in the dtype of `x` and `weight`;
        "screened"  a bfloat16 product proposes 1.5 k candidates, whose values are recomputed in the dtype of `x`;
                    the k largest of those are returned. Values are exact; a latent at the edge may be missed;
        "bfloat16"  the product in bfloat16, its values cast back.
    """
    tokens, n_latents = x.shape[0], weight.shape[0]
    proposed = candidates(k, n_latents, precision)
    values = x.new_empty(tokens, proposed)
    indices = torch.empty(tokens, proposed, dtype=torch.int64, device=x.device)
    product_dtype = x.dtype if precision == "float32" else torch.bfloat16
    rows, columns, shift = x.to(product_dtype), weight.to(product_dtype).T, bias.to(product_dtype)
    step = max(1, BLOCK_ELEMENTS // n_latents)
    block = torch.empty(min(step, tokens), n_latents, dtype=product_dtype, device=x.device)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        product = torch.addmm(shift, rows[start:stop], columns, out=block[: stop - start])
        values[start:stop], indices[start:stop] = _top_columns(product, proposed)
    if precision != "screened":
        return values, indices
    exact = row_products(x, weight, indices) + bias[indices]
    values, chosen = exact.topk(k, dim=-1, sorted=False)
    return values, indices.gather(-1, chosen)


def _top_columns(product: Tensor, k: int) -> tuple[Tensor, Tensor]:
    triton = triton_forms(product)
    found: tuple[Tensor, Tensor]
    found = product.topk(k, dim=-1, sorted=False) if triton is None else triton.top_columns(product, k)
    return found


def candidates(k: int, n_latents: int, precision: Precision) -> int:
    """How many latents of each token a product in `precision` proposes, of which k are kept."""
    return min(n_latents, round(k * SCREENING_MARGIN)) if precision == "screened" else k


def row_products(
    g: Float[Tensor, "tokens d"], weight: Float[Tensor, "n_latents d"], indices: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """`out[t, j] = <weight[indices[t, j]], g[t]>`, without gathering [tokens, k, d]."""
    if (triton := triton_forms(weight)) is not None:
        return triton.row_products(g, weight, indices)
    tokens, k = indices.shape
    starts = torch.arange(0, tokens * k + 1, k, device=g.device)
    pattern = _csr(starts, indices.reshape(-1), g.new_zeros(tokens * k), (tokens, weight.shape[0]))
    return torch.sparse.sampled_addmm(pattern, g, weight.T, beta=0.0).values().view(tokens, k)


def mix_rows(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], weight: Float[Tensor, "n_latents d"]
) -> Float[Tensor, "tokens d"]:
    """`out[t] = sum_j values[t, j] weight[indices[t, j]]`."""
    if (triton := triton_forms(weight)) is not None:
        return triton.mix_rows(values, indices, weight)
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def add_outer(
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    out: Float[Tensor, "n_latents d"],
    *,
    accumulate: bool = False,
) -> Float[Tensor, "n_latents d"]:
    """`out[f] = sum over (t, j) with indices[t, j] = f of values[t, j] x[t]`, added to `out` with `accumulate`.

    The order of the sums is fixed, so that the result does not depend on the number of threads.
    """
    if (triton := triton_forms(x)) is not None:
        return triton.add_outer(values, indices, x, out, accumulate=accumulate)
    tokens, k = indices.shape
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    starts = torch.zeros(out.shape[0] + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.bincount(flat, minlength=out.shape[0]), 0, out=starts[1:])
    pattern = _csr(starts, order.div(k, rounding_mode="floor"), values.reshape(-1)[order], (out.shape[0], tokens))
    return torch.addmm(out, pattern, x, beta=1.0 if accumulate else 0.0, out=out)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A CSR matrix. Its rows may hold a column twice, which PyTorch's invariants forbid and its products allow."""
    _accept_beta_notice()
    return torch.sparse_csr_tensor(
        starts, columns, values, size, dtype=values.dtype, device=values.device, check_invariants=False
    )


@functools.cache
def _accept_beta_notice() -> None:
    """PyTorch announces once a process that CSR tensors are in beta; the announcement is of no use to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
