"""The closed-form step and the sparse forms against autograd through the dense specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.sae import functional as fn
from trimtab.sae import kernels


def parameters(n_latents: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_latents)
    shapes = [(n_latents, d_in), (n_latents,), (n_latents, d_out), (d_out,)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def data(tokens: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_encode_dense_keeps_the_k_largest_and_no_negative_value() -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    encoder = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    latents = fn.encode_dense(x, encoder, torch.tensor([0.0, 0.5, 0.0]), 2)
    assert latents.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("tokens", "n_latents", "d", "k"), [(13, 37, 11, 5), (1, 3, 2, 3), (64, 129, 17, 1)])
def test_sparse_encode_equals_dense_in_value_and_gradient(tokens: int, n_latents: int, d: int, k: int) -> None:
    encoder, bias, _, _ = parameters(n_latents, d, d)
    x = data(tokens, d).requires_grad_()
    weights = data(tokens, n_latents, seed=2)
    dense = fn.encode_dense(x, encoder, bias, k)
    expected = torch.autograd.grad((dense * weights).sum(), [x, encoder, bias])

    latents = fn.sparse_encode(x, encoder, bias, k)
    scattered = torch.zeros_like(dense).scatter(-1, latents.indices, latents.values)
    torch.testing.assert_close(scattered, dense)
    found = torch.autograd.grad((latents.values * weights.gather(-1, latents.indices)).sum(), [x, encoder, bias])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_decode_equals_the_dense_product_for_any_leading_shape() -> None:
    _, _, decoder, bias = parameters(19, 7, 7)
    values, indices = data(30, 4).relu().view(5, 6, 4), torch.randint(0, 19, (5, 6, 4))
    dense = torch.zeros(5, 6, 19, dtype=torch.float64).scatter_add(-1, indices, values)
    torch.testing.assert_close(fn.sparse_decode(fn.Latents(values, indices), decoder, bias), dense @ decoder + bias)


@pytest.mark.parametrize("subtract_bias", [True, False])
@pytest.mark.parametrize("dead_every", [0, 3, 1])
@pytest.mark.parametrize("transcoder", [False, True])
def test_closed_form_equals_autograd(subtract_bias: bool, dead_every: int, transcoder: bool) -> None:
    d_in, d_out, n_latents, k = 9, (13 if transcoder else 9), 41, 6
    subtract_bias = subtract_bias and not transcoder
    weights = parameters(n_latents, d_in, d_out)
    x = data(50, d_in)
    target = data(50, d_out, seed=3) if transcoder else x
    dead = torch.zeros(n_latents, dtype=torch.bool)
    if dead_every:
        dead[::dead_every] = True
    shared = {"k": k, "variance": 7.3, "subtract_bias": subtract_bias, "k_aux": 5, "alpha": 0.4}
    reference = fn.loss_reference(x, target, fn.Weights(*weights), dead=dead if dead_every else None, **shared)
    expected = torch.autograd.grad(reference, weights)

    gradients = fn.Weights(*(torch.full_like(w, torch.nan) for w in weights))
    step = fn.loss_and_gradients(
        x, target, fn.Weights(*(w.detach() for w in weights)), gradients, dead=dead.nonzero()[:, 0], **shared
    )
    torch.testing.assert_close(step.loss + 0.4 * step.aux_loss, reference.detach())
    for name, gradient in zip(["encoder", "encoder_bias", "decoder", "decoder_bias"], expected, strict=True):
        torch.testing.assert_close(getattr(gradients, name), gradient, msg=name)


def test_aux_k_gradient_reaches_the_encoder_rows_of_dead_latents() -> None:
    """The fused encoder of sparsify 1.3.3 drops this gradient, so that its dead latents can hardly revive."""
    encoder, bias, decoder, _ = parameters(20, 8, 8)
    x, residual = data(16, 8), data(16, 8, seed=4)
    fn.aux_k_loss(x @ encoder.T + bias, decoder, residual, 4).backward()
    assert encoder.grad is not None
    assert bias.grad is not None
    assert decoder.grad is not None
    assert (encoder.grad.abs().sum(-1) > 0).sum() > 10


def test_aux_k_is_zero_without_dead_latents_or_variance() -> None:
    decoder = data(5, 3)
    assert fn.aux_k_loss(data(4, 0), decoder[:0], data(4, 3), 2) == 0
    assert fn.aux_k_loss(data(4, 5), decoder, torch.ones(4, 3, dtype=torch.float64), 2) == 0


def test_aux_k_uses_no_bias_and_at_most_all_dead_latents() -> None:
    pre, decoder, residual = data(6, 3).abs(), data(3, 4, seed=5), data(6, 4, seed=6)
    expected = (pre @ decoder - residual).square().sum(-1).mean()
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    torch.testing.assert_close(fn.aux_k_loss(pre, decoder, residual, 100), expected / variance)


def test_top_products_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, bias, _, _ = parameters(33, 6, 6)
    x = data(29, 6)
    whole = kernels.top_products(x, encoder.detach(), bias.detach(), 4)[0].sort().values
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 33 * 7)
    blocks = kernels.top_products(x, encoder.detach(), bias.detach(), 4)[0].sort().values
    torch.testing.assert_close(blocks, whole)


def test_screening_returns_exact_values_and_almost_always_the_same_latents() -> None:
    encoder, bias, _, _ = parameters(700, 64, 64, torch.float32)
    x = data(200, 64, torch.float32)
    exact, exact_indices = kernels.top_products(x, encoder.detach(), bias.detach(), 20)
    values, indices = kernels.top_products(x, encoder.detach(), bias.detach(), 20, precision="screened")
    torch.testing.assert_close(values, ((x @ encoder.T) + bias).detach().gather(-1, indices))
    same = sum(len(set(a) & set(b)) for a, b in zip(indices.tolist(), exact_indices.tolist(), strict=True))
    assert same / exact_indices.numel() > 0.999
    assert exact.shape == values.shape


def test_add_outer_accumulates_and_overwrites() -> None:
    values, indices, x = data(10, 3), torch.randint(0, 4, (10, 3)), data(10, 5, seed=7)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for t in range(10):
        for j in range(3):
            expected[indices[t, j]] += values[t, j] * x[t]
    out = torch.full((4, 5), torch.nan, dtype=torch.float64)
    kernels.add_outer(values, indices, x, out)
    torch.testing.assert_close(out, expected)
    kernels.add_outer(values, indices, x, out, accumulate=True)
    torch.testing.assert_close(out, 2 * expected)
