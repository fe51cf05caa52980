"""TopK sparse autoencoders on plain tensors: the formulas, once as a reference and once fast.

Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), arXiv 2406.04093, sections 2.3 and A.2.

Symbols: x [tokens, d_in] the activation that is read; t [tokens, d_out] the one that is written (t = x for an
autoencoder, another place's activation for a transcoder); E [n_latents, d_in], b_E the encoder, D [n_latents, d_out],
b_D the decoder, both with latents as rows; s = 1 if b_D is subtracted from the input, else 0.

    a       = (x - s b_D) E^T + b_E                                   pre-activations
    f       = relu(TopK_k(a))                                         latents: at most k are positive
    x_hat   = f D + b_D                                               reconstruction
    e       = t - x_hat                                               residual
    L_main  = mean over tokens of |e|^2 / V                           V: total variance of t, a constant of the run
    e_hat   = sum of the k_aux largest relu(a_l) D_l, l dead          no bias, e is a constant here
    L_aux   = mean |e_hat - e|^2 / mean |e - mean e|^2                0 where nothing is dead
    L       = L_main + alpha L_aux

Both terms are in units of a variance, so alpha keeps its meaning whatever the activations' scale.

`encode_dense` and `loss_reference` are the specification, differentiated by autograd. `sparse_encode` and
`sparse_decode` are their fast forms for any training loop. `loss_and_gradients` is the whole step in closed form:

    G       = dL/dx_hat = -2 e / (tokens V),      H = dL/de_hat = 2 alpha (e_hat - e) / (tokens Var_e)
    dL/df_j = <D_j, G>  (main),  <D_j, H>  (aux);   dL/da_j = dL/df_j where a_j > 0
    dL/dD   = f^T G + f_aux^T H;   dL/dE = (dL/da)^T (x - s b_D);   dL/db_E = sum over tokens of dL/da
    dL/db_D = sum over tokens of G - s (dL/db_E) E
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.sae import kernels
from trimtab.sae.encodings import DenseEncoding, Encoding, Latents
from trimtab.sae.kernels import Precision
from trimtab.sae.objectives import RECONSTRUCTION, Objective
from trimtab.sae.parallel import ALONE, Processes
from trimtab.sae.selection import Sparsifier, batch_top, top
from trimtab.sae.thresholds import Thresholds, jump_top

__all__ = [
    "Latents",
    "StepOutput",
    "Weights",
    "aux_k_loss",
    "encode_dense",
    "loss_and_gradients",
    "loss_reference",
    "sparse_decode",
    "sparse_encode",
]


class Weights(NamedTuple):
    """The four parameters of a dictionary, or their gradients."""

    encoder: Float[Tensor, "n_latents d_in"]
    encoder_bias: Float[Tensor, " n_latents"]
    decoder: Float[Tensor, "n_latents d_out"]
    decoder_bias: Float[Tensor, " d_out"]


DENSE = DenseEncoding()


def encode_dense(
    x: Float[Tensor, "tokens d_in"],
    encoder: Float[Tensor, "n_latents d_in"],
    encoder_bias: Float[Tensor, " n_latents"],
    k: int,
) -> Float[Tensor, "tokens n_latents"]:
    """f = relu(TopK_k(x E^T + b_E)) with all n_latents entries: the specification (`x` less `s b_D` already)."""
    a = x @ encoder.T + encoder_bias
    top = a.topk(k, dim=-1)
    return torch.zeros_like(a).scatter(-1, top.indices, top.values.relu())


def sparse_encode(
    x: Float[Tensor, "tokens d_in"],
    encoder: Float[Tensor, "rows d_in"],
    encoder_bias: Float[Tensor, " rows"],
    k: int,
    *,
    encoding: Encoding = DENSE,
    precision: Precision = "float32",
) -> Latents:
    """f as `Latents`, differentiable in `x`, `encoder` and `encoder_bias`; equal to `encode_dense`.

    The backward pass touches the encoder rows of the chosen latents only. Gradients need float32 or float64.
    """
    values, indices = _SparseEncode.apply(x, encoder, encoder_bias, k, encoding, precision)
    return Latents(values, indices)


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, k: int, encoding: Encoding, precision: Precision
    ) -> Any:
        latents, ctx.pullback = encoding.top(x, encoder, bias, k, precision=precision)
        ctx.save_for_backward(x, encoder)
        ctx.mark_non_differentiable(latents.indices)
        return latents.values, latents.indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, encoder = ctx.saved_tensors
        d_pre, rows = ctx.pullback(gradients[0])
        d_x = kernels.mix_rows(d_pre, rows, encoder) if ctx.needs_input_grad[0] else None
        d_encoder = d_bias = None
        if ctx.needs_input_grad[1]:
            d_encoder = kernels.add_outer(d_pre, rows, x, torch.empty_like(encoder))
        if ctx.needs_input_grad[2]:
            d_bias = _sum_by_index(d_pre, rows, encoder.shape[0])
        return d_x, d_encoder, d_bias, None, None, None


def sparse_decode(
    latents: Latents, decoder: Float[Tensor, "n_latents d_out"], decoder_bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "*tokens d_out"]:
    """x_hat = f D + b_D from sparse latents, differentiable in all of its tensors."""
    k = latents.values.shape[-1]
    mixed = kernels.mix_rows(latents.values.reshape(-1, k), latents.indices.reshape(-1, k), decoder)
    return mixed.view(*latents.values.shape[:-1], decoder.shape[-1]) + decoder_bias


def aux_k_loss(
    pre_activations: Float[Tensor, "tokens n_dead"],
    decoder: Float[Tensor, "n_dead d_out"],
    residual: Float[Tensor, "tokens d_out"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """L_aux of the dead latents, given their pre-activations and decoder rows; the gradient reaches both.

    `residual` is taken as a constant. 0 where there is no dead latent or the residual does not vary.
    """
    residual = residual.detach()
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    if pre_activations.shape[-1] == 0 or not variance > 0:
        return residual.new_zeros(())
    top = pre_activations.topk(min(k_aux, pre_activations.shape[-1]), dim=-1)
    estimate = kernels.mix_rows(top.values.relu(), top.indices, decoder)
    return (estimate - residual).square().sum(-1).mean() / variance


def loss_reference(
    x: Float[Tensor, "tokens d_in"],
    target: Float[Tensor, "tokens d_out"],
    weights: Weights,
    *,
    k: int,
    variance: float,
    subtract_bias: bool = True,
    dead: Bool[Tensor, " n_latents"] | None = None,
    k_aux: int = 0,
    alpha: float = 0.0,
) -> Float[Tensor, ""]:
    """L of the module's docstring through dense products and autograd: what the closed form is held against."""
    encoder, encoder_bias, decoder, decoder_bias = weights
    centred = x - decoder_bias if subtract_bias else x
    residual = target - (encode_dense(centred, encoder, encoder_bias, k) @ decoder + decoder_bias)
    loss = residual.square().sum(-1).mean() / variance
    if dead is not None and alpha:
        a = centred @ encoder[dead].T + encoder_bias[dead]
        loss = loss + alpha * aux_k_loss(a, decoder[dead], residual, k_aux)
    return loss


class StepOutput(NamedTuple):
    """What one closed-form step found: the two losses (0-dim tensors, no host sync), latents and residual."""

    loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    latents: Latents
    residual: Float[Tensor, "tokens d_out"]


@torch.no_grad()
def loss_and_gradients(
    x: Float[Tensor, "tokens d_in"],
    target: Float[Tensor, "tokens d_out"],
    weights: Weights,
    gradients: Weights,
    *,
    k: int,
    variance: float,
    encoding: Encoding = DENSE,
    objective: Objective = RECONSTRUCTION,
    sparsifier: Sparsifier = "topk",
    thresholds: Thresholds | None = None,
    subtract_bias: bool = True,
    dead: Int[Tensor, " n_dead"] | None = None,
    k_aux: int = 0,
    alpha: float = 0.0,
    aux_tokens: int | None = None,
    precision: Precision = "float32",
    processes: Processes = ALONE,
) -> StepOutput:
    """L_main, L_aux and every gradient of L, in closed form and without a [tokens, n_latents] tensor.

    objective: what L_main is; that of the module's docstring by default, others with |e|^2 summed over prefixes.
    sparsifier: "topk" selects k latents of each token, "batch_topk" k tokens' worth of the whole batch, "jumprelu" what
        lies above `thresholds`, whose two gradients are overwritten too (dense encoding, float32 or float64 precision).
    dead: the indices of the latents that AuxK may use; None or empty for no AuxK.
    aux_tokens: L_aux is that of so many tokens, evenly spaced; None for all. Where tokens come in random order it is
        an unbiased estimate, at that share of the cost.
    gradients: overwritten, not accumulated, with dL/d(parameter). Float32 or float64.
    processes: those that share the work: `weights`, `gradients` and `dead` are then of this process's latents (all
        of the decoder's bias), and `latents` of the output too; gradients are of the loss on this group's tokens, to be
        averaged over the groups.
    """
    encoder, encoder_bias, decoder, decoder_bias = weights
    centred = x - decoder_bias if subtract_bias else x
    k = objective.selected(k)
    if sparsifier == "jumprelu":
        assert thresholds is not None
        latents, pullback = jump_top(centred, encoder, encoder_bias, thresholds)
    else:
        select = top if sparsifier == "topk" else batch_top
        latents, pullback = select(
            encoding, centred, encoder, encoder_bias, k, decoder.shape[0], precision=precision, processes=processes
        )
    found = objective.loss_and_gradients(
        latents, decoder, decoder_bias, target, variance, gradients.decoder, k=k, processes=processes
    )
    d_pre, rows = pullback(found.d_values)
    kernels.add_outer(d_pre, rows, centred, gradients.encoder)
    gradients.encoder_bias.copy_(_sum_by_index(d_pre, rows, encoder.shape[0]))

    residual, aux_loss = found.residual, found.loss.new_zeros(())
    if dead is not None and alpha:
        n_dead = (
            len(dead)
            if processes.shards == 1
            else int(processes.sum_of_shards(torch.tensor(len(dead), device=x.device)))
        )
        if n_dead:
            few: slice | Tensor = slice(None)
            if aux_tokens is not None and aux_tokens < len(x):
                few = torch.arange(aux_tokens, device=x.device) * len(x) // aux_tokens
            aux_loss = _add_aux_gradients(
                centred[few], weights, residual[few], encoding, dead, min(k_aux, n_dead), alpha, gradients, processes
            )
    torch.sum(found.d_reconstruction, 0, out=gradients.decoder_bias)
    if subtract_bias:
        gradients.decoder_bias.sub_(processes.sum_of_shards(gradients.encoder_bias @ encoder))
    return StepOutput(found.loss, aux_loss, latents, residual)


def _add_aux_gradients(
    centred: Tensor,
    weights: Weights,
    residual: Tensor,
    encoding: Encoding,
    dead: Tensor,
    k_aux: int,
    alpha: float,
    gradients: Weights,
    processes: Processes,
) -> Tensor:
    """L_aux; its gradients are added to those of encoder, encoder bias and decoder."""
    mean = processes.mean_of_groups(residual.mean(0))
    variance = processes.mean_of_groups((residual - mean).square().sum(-1).mean())
    if not variance > 0:
        return residual.new_zeros(())
    encoder, encoder_bias, decoder, _ = weights
    (values, indices), pullback = top(
        encoding, centred, encoder, encoder_bias, k_aux, decoder.shape[0], among=dead, processes=processes
    )
    difference = processes.sum_of_shards(kernels.mix_rows(values, indices, decoder)) - residual
    d_estimate = difference * (2.0 * alpha / (len(centred) * variance))
    d_pre, rows = pullback(kernels.row_products(d_estimate, decoder, indices))
    kernels.add_outer(values, indices, d_estimate, gradients.decoder, accumulate=True)
    kernels.add_outer(d_pre, rows, centred, gradients.encoder, accumulate=True)
    gradients.encoder_bias.add_(_sum_by_index(d_pre, rows, encoder.shape[0]))
    return difference.square().sum(-1).mean() / variance


def _sum_by_index(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """Column sums of the sparse [tokens, size] matrix that holds `values` at `indices`."""
    return values.new_zeros(size).index_add_(0, indices.reshape(-1), values.reshape(-1))
