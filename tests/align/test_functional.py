"""Preference losses and the update, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.align.functional import dpo_loss, ipo_loss, kto_kl, kto_loss, trust_region_lerp_
from trimtab.core.errors import TrimtabError

BETA = 0.3


def ratios(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(*shape, generator=g, dtype=torch.float64).mul(3) for _ in range(2))
    return chosen.requires_grad_(), rejected.requires_grad_()


# -- identities ------------------------------------------------------------------------------------


def test_losses_of_a_policy_that_is_its_reference() -> None:
    zero = torch.zeros(3)
    torch.testing.assert_close(dpo_loss(zero, zero, beta=BETA), torch.full((3,), math.log(2)))
    torch.testing.assert_close(ipo_loss(zero, zero, beta=BETA), torch.full((3,), (1 / (2 * BETA)) ** 2))
    assert torch.equal(kto_loss(zero, torch.tensor([True, False, True]), zero[0], beta=BETA), torch.full((3,), 0.5))


def test_swapping_a_pair_turns_its_sign() -> None:
    chosen, rejected = ratios(7)
    h = chosen - rejected
    torch.testing.assert_close(dpo_loss(rejected, chosen, beta=BETA), torch.log1p((BETA * h).exp()))
    torch.testing.assert_close(dpo_loss(chosen, rejected, beta=BETA), torch.log1p((-BETA * h).exp()))
    torch.testing.assert_close(ipo_loss(rejected, chosen, beta=BETA), (-h - 1 / (2 * BETA)) ** 2)


def test_ipo_is_least_at_half_the_inverse_of_beta() -> None:
    h = torch.linspace(-3, 6, 901, dtype=torch.float64)
    loss = ipo_loss(h, torch.zeros_like(h), beta=BETA)
    assert abs(float(h[loss.argmin()]) - 1 / (2 * BETA)) < 0.01


def test_ipo_with_lengths_takes_means_over_tokens() -> None:
    chosen, rejected = ratios(5)
    lengths = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([5, 4, 3, 2, 1])
    found = ipo_loss(chosen, rejected, beta=BETA, chosen_length=lengths[0], rejected_length=lengths[1])
    torch.testing.assert_close(found, ipo_loss(chosen / lengths[0], rejected / lengths[1], beta=BETA))


def test_kto_weighs_both_sides_and_has_its_anchor_at_z() -> None:
    d, z = torch.tensor([1.0, 1.0, 2.0]), torch.tensor(2.0)
    desirable = torch.tensor([True, False, True])
    loss = kto_loss(d, desirable, z, beta=BETA, desirable_weight=2.0, undesirable_weight=3.0)
    up, down = 1 - torch.sigmoid(torch.tensor(-BETA)), 1 - torch.sigmoid(torch.tensor(BETA))
    torch.testing.assert_close(loss, torch.stack([2 * up, 3 * down, torch.tensor(1.0)]))


def test_z_is_a_mean_that_is_not_negative_and_has_no_gradient() -> None:
    d = torch.tensor([[1.0, -3.0], [1.0, 3.0]], requires_grad=True)
    assert torch.equal(kto_kl(d), torch.tensor([0.0, 2.0]))
    assert not kto_kl(d).requires_grad


def test_the_paired_form_of_the_official_code_has_another_gradient() -> None:
    """Its anchors are the means of the matched pairs' other sides, and not cut off: no form that we offer."""
    chosen, rejected = (x.detach().abs().requires_grad_() for x in ratios(6))  # so that no anchor is clamped at 0

    def official(w: Tensor, low: Tensor) -> Tensor:
        z_w, z_l = w.mean().clamp_min(0), low.mean().clamp_min(0)
        return (1 - torch.sigmoid(BETA * (w - z_l))) + (1 - torch.sigmoid(BETA * (z_w - low)))

    desirable = torch.tensor([True])
    ours = kto_loss(chosen, desirable, kto_kl(rejected), beta=BETA)
    ours = ours + kto_loss(rejected, ~desirable, kto_kl(chosen), beta=BETA)
    torch.testing.assert_close(ours, official(chosen, rejected))  # the values agree where the anchors do
    (mine,) = torch.autograd.grad(ours.sum(), chosen)
    (theirs,) = torch.autograd.grad(official(chosen, rejected).sum(), chosen)
    assert not torch.allclose(mine, theirs)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_gradients_by_finite_differences(loss: Callable[..., Tensor]) -> None:
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, beta=BETA), ratios(5))


def test_dpo_gradient_and_curvature_are_the_closed_forms() -> None:
    h = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dpo_loss(h, torch.zeros_like(h), beta=BETA).sum(), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), h)
    s = torch.sigmoid(BETA * h)
    torch.testing.assert_close(slope, -BETA * torch.sigmoid(-BETA * h))
    torch.testing.assert_close(curvature, BETA**2 * s * (1 - s))
    right = curvature[h.detach() >= 0]
    assert bool((right.diff() < 0).all())  # flat far from the reference: the paper's reason to move it


def test_kto_gradient_by_finite_differences() -> None:
    d, _ = ratios(6)
    desirable = torch.tensor([True, False, True, False, True, False])
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, desirable, torch.tensor(0.4), beta=BETA), (d,))


# -- the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, 0.6, 0.97])
def test_soft_updates_of_a_constant_policy_approach_it_geometrically(alpha: float) -> None:
    g = torch.Generator().manual_seed(1)
    policy, first = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    reference = first.clone()
    for n in range(1, 6):
        trust_region_lerp_(reference, policy, alpha)
        torch.testing.assert_close(reference, policy + (1 - alpha) ** n * (first - policy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weight_one_copies_exactly_into_a_storage_of_its_own(dtype: torch.dtype) -> None:
    policy = torch.randn(3, 4, dtype=dtype)
    reference = [torch.randn(3, 4, dtype=dtype)]
    trust_region_lerp_(reference, [policy], 1)
    assert torch.equal(reference[0], policy)
    policy.add_(1)
    assert not torch.equal(reference[0], policy)


def test_a_float32_reference_of_a_half_precision_policy_is_averaged_in_float32() -> None:
    policy = torch.tensor([1.0078125], dtype=torch.bfloat16)
    reference = torch.tensor([1.0])
    trust_region_lerp_(reference, policy, 0.25)
    assert float(reference) == 1 + 0.25 * 0.0078125


def test_no_graph_grows() -> None:
    policy, reference = torch.ones(2, requires_grad=True), torch.zeros(2)
    trust_region_lerp_(reference, policy, 0.5)
    assert reference.grad_fn is None
    assert not reference.requires_grad


def test_nothing_to_average_is_no_error() -> None:
    trust_region_lerp_([], [], 0.5)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_bad_betas_are_refused(beta: float) -> None:
    zero = torch.zeros(1)
    for call in (
        lambda: dpo_loss(zero, zero, beta=beta),
        lambda: ipo_loss(zero, zero, beta=beta),
        lambda: kto_loss(zero, zero > 0, zero, beta=beta),
    ):
        with pytest.raises(TrimtabError, match="beta="):
            call()


def test_one_length_alone_is_refused() -> None:
    zero = torch.zeros(1)
    with pytest.raises(TrimtabError, match="chosen_length and rejected_length"):
        ipo_loss(zero, zero, beta=BETA, chosen_length=torch.ones(1))


@pytest.mark.parametrize("weight", [0, -0.1, 1.1, math.nan])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(TrimtabError, match=r"policy_weight=.* \(0, 1\]"):
        trust_region_lerp_(torch.zeros(1), torch.zeros(1), weight)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TrimtabError, match=r"\[\[2\]\] and \[\[3\]\]"):
        trust_region_lerp_(torch.zeros(2), torch.zeros(3), 0.5)
    with pytest.raises(TrimtabError, match="must be equal"):
        trust_region_lerp_([torch.zeros(2)], [], 0.5)
