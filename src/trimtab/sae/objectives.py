"""What a dictionary is trained to do with its sparse latents.

Sources: HierarchicalTopK, arXiv 2505.24473, section 3 (every prefix in order of value); Matryoshka, arXiv 2503.17547
(prefixes in order of index); Multi-TopK, Gao et al. 2024, arXiv 2406.04093, section 4.3 (the prefixes K and 4K).

With x the target and x_hat_j its reconstruction from the first j of a token's latents, in the order of the objective,
all of them are one loss (`trimtab.sae.prefixes`) with other weights w_j:

    L = 1/(tokens d) sum over tokens and j of  w_j |x_hat_j - x|^2

    reconstruction      w_K = 1
    HierarchicalTopK    w_j = 1/|J| for j in J, by default every j of 1 … K; order of falling values
    Multi-TopK          w_k = 1, w_4k = 1/8; order of falling values
    Matryoshka          order of index; for each of M cuts q, w_j = 1/|M| at the j that counts the token's i_t < q
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import kernels
from trimtab.sae.encodings import Latents
from trimtab.sae.parallel import ALONE, Processes
from trimtab.sae.prefixes import prefix_loss, prefix_loss_and_gradients

__all__ = [
    "RECONSTRUCTION",
    "Hierarchical",
    "Matryoshka",
    "MultiTopK",
    "Objective",
    "ObjectiveGradients",
    "hierarchical_topk_loss",
    "hierarchical_weights",
    "matryoshka_weights",
    "multi_topk_weights",
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


# -- for the latents of any library ----------------------------------------------------------------


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
