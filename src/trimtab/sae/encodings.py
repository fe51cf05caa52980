"""From an encoder's pre-activations to the largest latents of a token, and the gradient back.

An encoder is a matrix E [rows, d] and a bias b [rows]; an *encoding* says what the latents are in terms of x E^T + b.
For the dense encoding every row is a latent; KronSAE's (`trimtab.sae.kron`) makes h m n latents of h (m + n) rows. The
gradient with respect to the pre-activations has a few entries a token, which the pullback names by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.sae import kernels
from trimtab.sae.kernels import Precision

__all__ = ["DenseEncoding", "Encoding", "Latents", "Pullback", "blocks", "joined"]


class Latents(NamedTuple):
    """Sparse latents of each token. Slots whose pre-activation is not positive hold the value 0 and any index."""

    values: Float[Tensor, "*tokens k"]
    indices: Int[Tensor, "*tokens k"]


Pullback = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From dL/d(values) [tokens, k] to the entries of dL/d(pre-activations) [tokens, r] and their encoder rows."""


@runtime_checkable
class Encoding(Protocol):
    """What the latents are in terms of the pre-activations."""

    @property
    def blocks(self) -> int:
        """Blocks of equally many encoder rows, in each of which the rows come in the order of the latents."""

    def part(self, parts: int) -> Encoding:
        """That of one of `parts` equal runs of latents, with its share of each block's rows."""

    def top(
        self,
        x: Tensor,
        encoder: Tensor,
        bias: Tensor,
        k: int,
        *,
        precision: Precision = "float32",
        among: Tensor | None = None,
    ) -> tuple[Latents, Pullback]:
        """The k largest latents of each token, of all or of those `among`, unsorted; values of 0 where not positive."""


class DenseEncoding:
    """Every row of the encoder is a latent: f = relu(TopK(x E^T + b))."""

    @property
    def blocks(self) -> int:
        return 1

    def part(self, parts: int) -> DenseEncoding:
        return self

    def top(
        self,
        x: Float[Tensor, "tokens d"],
        encoder: Float[Tensor, "n_latents d"],
        bias: Float[Tensor, " n_latents"],
        k: int,
        *,
        precision: Precision = "float32",
        among: Int[Tensor, " some"] | None = None,
    ) -> tuple[Latents, Pullback]:
        if among is None:
            pre, indices = kernels.top_products(x, encoder, bias, k, precision=precision)
        else:
            pre, local = kernels.top_products(x, encoder[among], bias[among], k)
            indices = among[local]

        def pullback(d_values: Tensor) -> tuple[Tensor, Tensor]:
            return d_values * (pre > 0), indices

        return Latents(pre.relu(), indices), pullback


def blocks(tokens: int, width: int) -> Iterator[slice]:
    """Blocks of tokens in which `width` entries for each stay below what is held at once."""
    step = max(1, kernels.BLOCK_ELEMENTS // width)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def joined(parts: Sequence[Latents]) -> Latents:
    """The latents of blocks of tokens as one, with the slots of the widest block; what is filled in has the value 0."""
    width = max(part.values.shape[-1] for part in parts)
    values, indices = (
        torch.cat([F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors])
        for tensors in zip(*parts, strict=True)
    )
    return Latents(values, indices)
