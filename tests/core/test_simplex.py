"""Divergence, entropy, blend, trust region and priors against identities, float64 brute force and hypothesis."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from trimtab.core import simplex
from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import (
    entropy,
    geometric_blend,
    kl,
    noncentral_chi2,
    truncated_geometric,
    trust_region_blend,
)

INF = math.inf


def random_logits(*shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def pair(rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and teacher logits whose rows have KL(q || p) of about 1 nat."""
    student = random_logits(rows, vocab, seed=seed, dtype=dtype)
    return student, student + random_logits(rows, vocab, seed=seed + 1, scale=1.3, dtype=dtype)


def plain_bisection(student: Tensor, teacher: Tensor, epsilon: float, steps: int = 60) -> Tensor:
    """beta of the paper's solver, in float64, written from the definitions."""
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    low, high = torch.zeros(len(log_p), dtype=torch.float64), torch.ones(len(log_p), dtype=torch.float64)
    for _ in range(steps):
        middle = (low + high) / 2
        log_mu = (log_p + middle[:, None] * (log_q - log_p)).log_softmax(-1)
        feasible = (log_mu.exp() * (log_mu - log_p)).sum(-1) <= epsilon
        low, high = torch.where(feasible, middle, low), torch.where(feasible, high, middle)
    return torch.where((log_q.exp() * (log_q - log_p)).sum(-1) <= epsilon, 1.0, low)


# --- kl and entropy


def test_kl_is_zero_for_equal_distributions_with_zero_gradient() -> None:
    logits = random_logits(5, 7, seed=0).requires_grad_()
    log_p = logits.log_softmax(-1)
    divergence = kl(log_p, log_p.detach())
    assert torch.equal(divergence, torch.zeros(5))
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(5, 7), atol=1e-6, rtol=0)


def test_kl_and_entropy_agree_with_numpy_in_both_directions() -> None:
    log_p = random_logits(3, 4, 11, seed=1, dtype=torch.float64).log_softmax(-1)
    log_q = random_logits(3, 4, 11, seed=2, dtype=torch.float64).log_softmax(-1)
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    torch.testing.assert_close(kl(log_p, log_q), torch.from_numpy((p * np.log(p / q)).sum(-1)))
    torch.testing.assert_close(kl(log_q, log_p), torch.from_numpy((q * np.log(q / p)).sum(-1)))
    torch.testing.assert_close(entropy(log_p), torch.from_numpy(-(p * np.log(p)).sum(-1)))


def test_kl_broadcasts_a_prior_over_a_batch() -> None:
    prior = truncated_geometric(0.3, 5)
    log_q = random_logits(2, 3, 5, seed=3).log_softmax(-1)
    assert kl(prior, log_q).shape == (2, 3)
    torch.testing.assert_close(kl(log_q, prior)[1, 2], kl(log_q[1, 2], prior))


def test_kl_and_entropy_with_empty_support() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2), INF, INF]
    torch.testing.assert_close(kl(log_p, log_q), torch.tensor(expected))
    torch.testing.assert_close(entropy(log_p), torch.tensor([math.log(2)] * 3 + [0.0]))


def test_gradients_are_finite_where_there_is_no_mass() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]).log().requires_grad_()
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log().requires_grad_()
    for value in (kl(log_p, log_q).sum(), entropy(log_p).sum() + entropy(log_q).sum()):
        for gradient in torch.autograd.grad(value, [log_p, log_q], allow_unused=True):
            assert bool(gradient.isfinite().all())
    (gradient,) = torch.autograd.grad(kl(log_p, log_q)[1], log_p)
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_gradients_of_kl_and_entropy_are_those_of_finite_differences() -> None:
    p = random_logits(3, 5, seed=4, dtype=torch.float64).requires_grad_()
    q = random_logits(3, 5, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kl(a.log_softmax(-1), b.log_softmax(-1)), (p, q))
    assert torch.autograd.gradcheck(lambda a: entropy(a.log_softmax(-1)), (p,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    log_p = random_logits(4, 9, seed=6).log_softmax(-1).to(dtype)
    log_q = random_logits(4, 9, seed=7).log_softmax(-1).to(dtype)
    assert kl(log_p, log_q).dtype == entropy(log_p).dtype == torch.float32
    assert torch.equal(kl(log_p, log_q), kl(log_p.float(), log_q.float()))
    assert torch.equal(geometric_blend(log_p, log_q, 0.3), geometric_blend(log_p.float(), log_q.float(), 0.3))


# --- geometric blend


def test_blend_at_the_ends_and_in_the_middle() -> None:
    log_p = random_logits(4, 9, seed=8, dtype=torch.float64).log_softmax(-1)
    log_q = random_logits(4, 9, seed=9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(geometric_blend(log_p, log_q, 0), log_p)
    torch.testing.assert_close(geometric_blend(log_p, log_q, 1), log_q)
    middle = (log_p.exp() * log_q.exp()).sqrt()
    torch.testing.assert_close(geometric_blend(log_p, log_q, 0.5).exp(), middle / middle.sum(-1, keepdim=True))
    per_row = geometric_blend(log_p, log_q, torch.tensor([0.0, 0.5, 0.5, 1.0]))
    torch.testing.assert_close(per_row[1:3], geometric_blend(log_p, log_q, 0.5)[1:3])
    torch.testing.assert_close(per_row[3], log_q[3])


def test_blend_lives_on_the_common_support() -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    log_q = torch.tensor([0.0, 0.6, 0.2, 0.2]).log()
    torch.testing.assert_close(geometric_blend(log_p, log_q, 0.0), log_p)
    torch.testing.assert_close(geometric_blend(log_p, log_q, 1.0).exp(), torch.tensor([0.0, 0.75, 0.25, 0.0]))
    assert geometric_blend(log_p, log_q, 1e-3).exp()[0] == 0


def test_blend_is_differentiable_in_all_arguments() -> None:
    p = random_logits(3, 5, seed=10, dtype=torch.float64).requires_grad_()
    q = random_logits(3, 5, seed=11, dtype=torch.float64).requires_grad_()
    beta = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64).requires_grad_()

    def blend(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return geometric_blend(a.log_softmax(-1), b.log_softmax(-1), c)

    inner = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(blend, (p, q, inner))
    masked = p.detach().log_softmax(-1).masked_fill(torch.eye(3, 5).bool(), -INF).requires_grad_()
    value = geometric_blend(masked, q.log_softmax(-1), beta).exp().square().sum()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, [masked, q, beta]))


def test_derivative_of_kl_along_beta_is_beta_times_variance() -> None:
    log_p = random_logits(6, seed=12, dtype=torch.float64).log_softmax(-1)
    log_q = random_logits(6, seed=13, dtype=torch.float64).log_softmax(-1)
    beta = torch.tensor(0.37, dtype=torch.float64).requires_grad_()
    log_mu = geometric_blend(log_p, log_q, beta)
    (slope,) = torch.autograd.grad(kl(log_mu, log_p), beta)
    mu, ratio = log_mu.detach().exp(), log_q - log_p
    variance = (mu * ratio.square()).sum() - (mu * ratio).sum() ** 2
    torch.testing.assert_close(slope, beta.detach() * variance)


# --- trust region


def test_epsilon_zero_is_the_student_bit_for_bit() -> None:
    student, teacher = pair(7, 23)
    log_mu, beta, divergence = trust_region_blend(student, teacher, 0)
    assert torch.equal(log_mu, student.log_softmax(-1))
    assert torch.equal(beta, torch.zeros(7))
    assert torch.equal(divergence, torch.zeros(7))
    log_mu, _, _ = trust_region_blend(student.bfloat16(), teacher.bfloat16(), 0.0, temperature=0.7)
    assert torch.equal(log_mu, (student.bfloat16().float() / 0.7).log_softmax(-1))


def test_epsilon_infinite_is_the_teacher() -> None:
    student, teacher = pair(7, 23)
    log_mu, beta, divergence = trust_region_blend(student, teacher, INF)
    assert torch.equal(log_mu, teacher.log_softmax(-1))
    assert torch.equal(beta, torch.ones(7))
    torch.testing.assert_close(divergence, kl(teacher.log_softmax(-1), student.log_softmax(-1)))


def test_a_teacher_within_the_region_is_taken_whole() -> None:
    student, teacher = pair(9, 31)
    distance = kl(teacher.log_softmax(-1), student.log_softmax(-1))
    epsilon = distance.median().item()
    _, beta, _ = trust_region_blend(student, teacher, epsilon * (1 + 1e-4))
    assert torch.equal(beta == 1, distance <= epsilon * (1 + 1e-4))
    assert int((beta == 1).sum()) == 5


def test_equal_models_blend_to_themselves() -> None:
    student, _ = pair(3, 11)
    log_mu, beta, divergence = trust_region_blend(student, student + 2.0, 0.01)
    torch.testing.assert_close(log_mu, student.log_softmax(-1))
    assert torch.equal(beta, torch.ones(3))
    torch.testing.assert_close(divergence, torch.zeros(3), atol=5e-7, rtol=0)


@pytest.mark.parametrize("vocab", [2, 6, 103])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.02, 0.3])
def test_the_constraint_is_active_and_kept(vocab: int, epsilon: float) -> None:
    student, teacher = pair(41, vocab)
    log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    measured = kl(log_mu, log_p)
    torch.testing.assert_close(divergence, measured, atol=1e-6, rtol=0)
    assert bool((measured <= epsilon * (1 + 1e-3) + 1e-6).all())
    inner = (beta > 0) & (beta < 1)
    assert int(inner.sum()) > 5
    assert bool(((measured - epsilon).abs() <= 1e-3 * epsilon + 1e-6)[inner].all())
    assert bool((kl(log_mu, log_q) <= kl(log_p, log_q) + 1e-6).all())
    torch.testing.assert_close(log_mu.exp().sum(-1), torch.ones(41))
    torch.testing.assert_close(log_mu, geometric_blend(log_p, log_q, beta), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 0.02, 0.3, 1.5])
def test_float64_agrees_with_plain_bisection(epsilon: float) -> None:
    student, teacher = pair(37, 29, dtype=torch.float64)
    log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
    assert log_mu.dtype == beta.dtype == divergence.dtype == torch.float64
    torch.testing.assert_close(beta, plain_bisection(student, teacher, epsilon), atol=1e-9, rtol=1e-8)
    assert bool((divergence <= epsilon).all())


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_agrees_with_constrained_optimisation(seed: int) -> None:
    """SLSQP on (1) itself, over mu, knows nothing of the closed form."""
    student, teacher = pair(1, 6, seed=10 * seed, dtype=torch.float64)
    p, q = student[0].softmax(-1).numpy(), teacher[0].softmax(-1).numpy()
    epsilon = 0.05

    def divergence(mu: np.ndarray, other: np.ndarray) -> float:
        return float((mu * np.log(mu / other)).sum())

    solution = minimize(
        lambda mu: divergence(mu, q),
        p,
        jac=lambda mu: np.log(mu / q) + 1,
        method="SLSQP",
        bounds=[(1e-9, 1)] * 6,
        constraints=[
            {"type": "eq", "fun": lambda mu: mu.sum() - 1, "jac": lambda mu: np.ones(6)},
            {
                "type": "ineq",
                "fun": lambda mu: epsilon - divergence(mu, p),
                "jac": lambda mu: -(np.log(mu / p) + 1),
            },
        ],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    log_mu, beta, _ = trust_region_blend(student[0], teacher[0], epsilon)
    assert 0 < float(beta) < 1
    assert solution.success, solution.message
    np.testing.assert_allclose(log_mu.exp().numpy(), solution.x, atol=1e-6)


def test_symmetric_pair_of_two_tokens() -> None:
    """p = (s, 1-s), q = (1-s, s): logits of mu shrink by 1 - 2 beta, so mu solves a binary KL in one unknown."""
    half = 0.8
    student = torch.tensor([[half, -half]], dtype=torch.float64)
    log_mu, beta, _ = trust_region_blend(student, -student, 0.1)
    torch.testing.assert_close(log_mu, ((1 - 2 * beta[:, None]) * student).log_softmax(-1))
    shift = 1 - 2 * float(beta)
    m, p = 1 / (1 + math.exp(-2 * half * shift)), 1 / (1 + math.exp(-2 * half))
    assert m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p)) == pytest.approx(0.1, abs=1e-9)


def test_small_epsilon_follows_the_expansion() -> None:
    student, teacher = pair(5, 17, dtype=torch.float64)
    log_p = student.log_softmax(-1)
    ratio = teacher.log_softmax(-1) - log_p
    p = log_p.exp()
    variance = (p * ratio.square()).sum(-1) - (p * ratio).sum(-1) ** 2
    log_mu, beta, _ = trust_region_blend(student, teacher, 1e-9)
    torch.testing.assert_close(beta * (variance / 2e-9).sqrt(), torch.ones(5).double(), atol=1e-3, rtol=0)
    log_q = teacher.log_softmax(-1)
    gain = kl(log_p, log_q) - kl(log_mu, log_q)
    torch.testing.assert_close(gain, (2e-9 * variance).sqrt(), atol=0, rtol=1e-3)


def test_epsilon_per_row_is_each_row_alone() -> None:
    student, teacher = pair(6, 19)
    epsilon = torch.tensor([0.0, 1e-3, INF, 0.02, 0.5, 0.0])
    log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
    for row, radius in enumerate(epsilon.tolist()):
        alone = trust_region_blend(student[row], teacher[row], radius)
        for got, expected in zip(alone, (log_mu, beta, divergence), strict=True):
            torch.testing.assert_close(got, expected[row], atol=1e-6, rtol=1e-6)
    cube = [x.reshape(2, 3, 19) for x in (student, teacher)]
    shaped = trust_region_blend(*cube, epsilon.reshape(2, 3))
    assert torch.equal(shaped[0].reshape(6, 19), log_mu)
    assert shaped[1].shape == shaped[2].shape == (2, 3)


def test_invariances() -> None:
    student, teacher = pair(8, 21)
    log_mu, beta, _ = trust_region_blend(student, teacher, 0.02)
    shifted, shifted_beta, _ = trust_region_blend(student + 5, teacher - torch.arange(8.0)[:, None], 0.02)
    torch.testing.assert_close(shifted, log_mu, atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted_beta, beta, atol=1e-4, rtol=0)
    tokens, rows = torch.randperm(21), torch.randperm(8)
    permuted, _, _ = trust_region_blend(student[rows][:, tokens], teacher[rows][:, tokens], 0.02)
    torch.testing.assert_close(permuted, log_mu[rows][:, tokens], atol=1e-4, rtol=0)
    tempered, tempered_beta, _ = trust_region_blend(student * 1.7, teacher * 1.7, 0.02, temperature=1.7)
    torch.testing.assert_close(tempered, log_mu, atol=1e-4, rtol=0)
    torch.testing.assert_close(tempered_beta, beta, atol=1e-4, rtol=0)


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(11, 13)
    whole = trust_region_blend(student, teacher, 0.02)
    monkeypatch.setattr(simplex, "_BLOCK_CPU", 3 * 13)
    for got, expected in zip(trust_region_blend(student, teacher, 0.02), whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert [x.shape for x in trust_region_blend(student[:0], teacher[:0], 0.02)] == [(0, 13), (0,), (0,)]


def test_solved_rows_cost_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair(200, 40)
    rows_per_step: list[int] = []
    moments = simplex._moments

    def counted(base: Tensor, log_ratio: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows_per_step.append(len(base))
        return moments(base, log_ratio, beta)

    monkeypatch.setattr(simplex, "_moments", counted)
    trust_region_blend(student, teacher, 0.02)
    assert rows_per_step == sorted(rows_per_step, reverse=True)
    # Both ends, then Newton: 25 bisections would be 27.
    assert sum(rows_per_step) / 200 < 8
    assert rows_per_step[-1] < 20


# --- trust region with masks and extremes


def test_tokens_outside_the_students_support_stay_outside() -> None:
    student, teacher = pair(5, 12)
    student[:, 3] = -INF
    student[2, :6] = -INF
    log_p = student.log_softmax(-1)
    log_mu, beta, divergence = trust_region_blend(student, teacher, 0.02)
    assert bool((log_mu.exp()[log_p == -INF] == 0).all())
    assert bool(((beta > 0) & (beta < 1)).all())
    torch.testing.assert_close(divergence, torch.full((5,), 0.02), atol=2e-6, rtol=0)
    torch.testing.assert_close(kl(log_mu, log_p), divergence, atol=1e-6, rtol=0)
    whole, ones, distance = trust_region_blend(student, teacher, INF)
    restricted = teacher.masked_fill(student == -INF, -INF).log_softmax(-1)
    assert torch.equal(whole, restricted)
    assert torch.equal(ones, torch.ones(5))
    torch.testing.assert_close(distance, kl(restricted, log_p), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 0.02, 0.3, INF])
def test_what_both_mask_is_as_if_it_were_not_there(epsilon: float) -> None:
    """Also in a row with a token that the teacher alone masks."""
    student, teacher = pair(7, 20, dtype=torch.float64)
    student[4, 2], teacher[4, 2] = -8.0, -INF
    alone = trust_region_blend(student[:, :17], teacher[:, :17], epsilon)
    for logits in (student, teacher):
        logits[:, 17:] = -INF
    log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
    assert bool((log_mu[:, 17:] == -INF).all())
    for found, wanted in zip((log_mu[:, :17], beta, divergence), alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    unmasked = [0, 1, 2, 3, 5, 6]
    by_bisection = plain_bisection(student[unmasked, :17], teacher[unmasked, :17], epsilon)
    torch.testing.assert_close(beta[unmasked], by_bisection, atol=1e-9, rtol=1e-8)
    assert bool((beta > 0).all())


def test_a_jump_at_zero_keeps_the_student_until_epsilon_reaches_it() -> None:
    student = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64).log()
    teacher = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64).log()
    jump = -math.log(0.96)
    log_mu, beta, divergence = trust_region_blend(student, teacher, jump - 1e-6)
    assert torch.equal(log_mu, student.log_softmax(-1))
    assert float(beta) == float(divergence) == 0
    log_mu, beta, divergence = trust_region_blend(student, teacher, jump + 1e-4)
    assert 0 < float(beta) < 0.1
    assert float(divergence) == pytest.approx(jump + 1e-4, abs=1e-9)
    assert float(log_mu[2]) == -INF
    torch.testing.assert_close(log_mu, geometric_blend(student, teacher, beta), atol=1e-9, rtol=1e-9)


def test_teacher_masks_of_little_mass_do_not_matter() -> None:
    student, teacher = pair(6, 15)
    student[:, 4] = -30.0
    masked = teacher.clone()
    masked[:, 4] = -INF
    log_mu, beta, _ = trust_region_blend(student, masked, 0.02)
    expected, expected_beta, _ = trust_region_blend(student, teacher - 40 * torch.eye(15)[4], 0.02)
    torch.testing.assert_close(beta, expected_beta, atol=1e-5, rtol=0)
    kept = torch.arange(15) != 4
    torch.testing.assert_close(log_mu[:, kept], expected[:, kept], atol=1e-4, rtol=0)


def test_disjoint_supports_give_the_student() -> None:
    student = torch.tensor([[0.0, 1.0, -INF, -INF], [0.3, 0.2, 0.1, 0.0]])
    teacher = torch.tensor([[-INF, -INF, 1.0, 0.0], [0.0, 0.4, 0.2, 0.1]])
    for epsilon in (0.01, INF):
        log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
        assert torch.equal(log_mu[0], student[0].log_softmax(-1))
        assert float(beta[0]) == float(divergence[0]) == 0
        assert float(beta[1]) > 0


@pytest.mark.parametrize("floor", [torch.finfo(torch.float32).min, -1e30, -65504.0, -300.0])
def test_logits_that_are_masks_in_all_but_name(floor: float) -> None:
    """Hugging Face masks with the dtype's lowest number: finite, but it must not swallow the other tokens."""
    student, teacher = pair(4, 10)
    for masked in ("student", "teacher"):
        logits = {"student": student.clone(), "teacher": teacher.clone()}
        logits[masked][:, 2] = floor
        # As good as no mass where the other model is concerned, so that a real mask gives the same.
        logits["teacher" if masked == "student" else "student"][:, 2] = -25.0
        log_mu, beta, _ = trust_region_blend(logits["student"], logits["teacher"], 0.02)
        logits[masked][:, 2] = -INF
        expected, expected_beta, _ = trust_region_blend(logits["student"], logits["teacher"], 0.02)
        kept = torch.arange(10) != 2
        torch.testing.assert_close(beta, expected_beta, atol=1e-4, rtol=0)
        torch.testing.assert_close(log_mu[:, kept], expected[:, kept], atol=1e-3, rtol=0)


def test_confident_models_that_disagree() -> None:
    student = torch.tensor([[200.0, 0.0, 1.0, 2.0]])
    teacher = torch.tensor([[0.0, 200.0, 1.0, 2.0]])
    log_mu, beta, divergence = trust_region_blend(student, teacher, 0.02)
    assert bool(log_mu.isfinite().all())
    assert 0.4 < float(beta) < 0.6
    assert float(divergence) == pytest.approx(0.02, abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_cast_up_first(dtype: torch.dtype) -> None:
    student, teacher = pair(6, 33, dtype=dtype)
    results = trust_region_blend(student, teacher, 0.02)
    for got, expected in zip(results, trust_region_blend(student.float(), teacher.float(), 0.02), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_float32_input_never_becomes_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            seen.update(x.dtype for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    student, teacher = pair(6, 33)
    with Watch():
        trust_region_blend(student, teacher, 0.02)
        kl(student.log_softmax(-1), geometric_blend(student, teacher, 0.5))
        entropy(student.log_softmax(-1))
        truncated_geometric(0.1, 12)
    assert torch.float32 in seen
    assert torch.float64 not in seen


def test_inputs_are_left_alone_and_carry_no_gradient() -> None:
    student, teacher = pair(3, 9)
    student.requires_grad_()
    copies = student.detach().clone(), teacher.clone()
    log_mu, beta, _ = trust_region_blend(student, teacher, 0.02)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])
    assert (log_mu.requires_grad, beta.requires_grad) == (False, False)


logit = st.one_of(st.floats(-30, 30, width=32), st.just(-INF))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(logit, logit), min_size=5, max_size=5), min_size=1, max_size=3),
    radii=st.tuples(st.floats(0, 3, width=32), st.floats(0, 3, width=32)),
)
def test_trust_region_properties(rows: list[list[tuple[float, float]]], radii: tuple[float, float]) -> None:
    logits = torch.tensor(rows)
    logits[:, 0] = logits[:, 0].clamp(min=-30)  # a finite logit in each row
    student, teacher = logits[..., 0], logits[..., 1]
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    small, large = sorted(radii)
    previous_beta, previous_cost = torch.zeros(len(rows)), kl(log_p, log_q)
    for epsilon in (small, large):
        log_mu, beta, divergence = trust_region_blend(student, teacher, epsilon)
        assert not bool(log_mu.isnan().any())
        torch.testing.assert_close(log_mu.exp().sum(-1), torch.ones(len(rows)), atol=1e-5, rtol=0)
        measured = kl(log_mu, log_p)
        torch.testing.assert_close(divergence, measured, atol=2e-5, rtol=1e-5)
        assert bool((measured <= epsilon * (1 + 1e-3) + 5e-6).all())
        assert bool((beta >= previous_beta - 1e-3).all())
        cost = kl(log_mu, log_q)
        assert bool((cost <= previous_cost * (1 + 1e-4) + 1e-4).all())
        previous_beta, previous_cost = beta, cost


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(logit, logit), min_size=2, max_size=6))
def test_kl_and_entropy_properties(logits: list[tuple[float, float]]) -> None:
    values = torch.tensor(logits)
    values[0] = values[0].clamp(min=-30)
    log_p, log_q = values[:, 0].log_softmax(-1), values[:, 1].log_softmax(-1)
    for divergence in (kl(log_p, log_q), kl(log_q, log_p)):
        assert float(divergence) >= -1e-5
    assert -1e-6 <= float(entropy(log_p)) <= math.log(len(logits)) + 1e-5


# --- priors


def test_truncated_geometric_is_a_distribution_with_the_tail_on_the_last() -> None:
    prior = truncated_geometric(0.1, 12, dtype=torch.float64).exp()
    expected = torch.tensor([0.1 * 0.9**i for i in range(11)] + [0.9**11], dtype=torch.float64)
    torch.testing.assert_close(prior, expected, atol=1e-15, rtol=1e-13)
    assert float(prior.sum()) == pytest.approx(1, abs=1e-14)
    assert float(prior @ torch.arange(1.0, 13, dtype=torch.float64)) == pytest.approx(7.18, abs=0.01)
    assert float(prior[-1]) == pytest.approx(0.314, abs=5e-4)
    assert torch.equal(truncated_geometric(0.4, 1), torch.zeros(1))
    assert torch.equal(truncated_geometric(1, 3), torch.tensor([0.0, -INF, -INF]))
    assert truncated_geometric(0.4, 5).dtype == torch.float32


def test_noncentral_chi2_has_varans_values() -> None:
    golden = [0.007, 0.013, 0.024, 0.041, 0.065, 0.098, 0.135, 0.166, 0.176, 0.150, 0.090, 0.035]
    reversed_prior = noncentral_chi2(6, 12).flip(0).exp()
    torch.testing.assert_close(reversed_prior, torch.tensor(golden), atol=6e-4, rtol=0)
    peaks = [int(noncentral_chi2(df, 12).flip(0).argmax()) + 1 for df in (6, 35, 400)]
    assert peaks == [9, 8, 7]
    assert torch.equal(noncentral_chi2(6, 1), torch.zeros(1))


@pytest.mark.parametrize("n", [2, 3, 12, 24])
@pytest.mark.parametrize("df", [0.3, 2.0, 6, 400])
def test_noncentral_chi2_is_a_distribution(n: int, df: float) -> None:
    prior = noncentral_chi2(df, n, noncentrality=1.5, dtype=torch.float64)
    assert float(prior.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert bool(prior.isfinite().all())


# --- bad input

LOGITS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (LOGITS, torch.zeros(2, 5), {}, r"shapes \[2, 4\] and \[2, 5\]"),
        (LOGITS, torch.zeros(4), {}, r"shapes \[2, 4\] and \[4\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), {}, "last axis is empty"),
        (LOGITS, LOGITS, {"epsilon": -0.1}, "epsilon=-0.1"),
        (LOGITS, LOGITS, {"epsilon": math.nan}, "epsilon=nan"),
        (LOGITS, LOGITS, {"epsilon": torch.tensor([0.1, -2.0])}, "epsilon=-2.0"),
        (LOGITS, LOGITS, {"epsilon": torch.zeros(3)}, r"epsilon has shape \[3\]"),
        (LOGITS, LOGITS, {"temperature": 0}, "temperature=0"),
        (LOGITS, LOGITS, {"temperature": -1.0}, "temperature=-1.0"),
        (LOGITS, LOGITS, {"temperature": math.nan}, "temperature=nan"),
        (LOGITS, LOGITS, {"temperature": INF}, "temperature=inf"),
    ],
)
def test_bad_arguments_are_named(student: Tensor, teacher: Tensor, options: dict, message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        trust_region_blend(student, teacher, **{"epsilon": 0.02, **options})


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.0, math.nan, 0.0, 0.0], "NaN in row 1"),
        ([0.0, 0.0, INF, 0.0], r"\+inf in row 1"),
        ([-INF] * 4, "no finite value in row 1"),
    ],
)
def test_bad_rows_are_named(row: list[float], message: str, which: str, epsilon: float) -> None:
    logits = {"student_logits": LOGITS, "teacher_logits": LOGITS}
    logits[which] = torch.stack([LOGITS[0], torch.tensor(row)])
    with pytest.raises(TrimtabError, match=f"{which} has {message}"):
        trust_region_blend(**logits, epsilon=epsilon)


def test_bad_input_elsewhere_is_named() -> None:
    log_p = LOGITS.log_softmax(-1)
    with pytest.raises(TrimtabError, match=r"shapes \[2, 4\] and \[2, 5\]"):
        kl(log_p, torch.zeros(2, 5))
    with pytest.raises(TrimtabError, match=r"shapes \[2, 4\] and \[3, 4\]"):
        geometric_blend(log_p, torch.zeros(3, 4), 0.5)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(TrimtabError, match=f"beta={beta}"):
            geometric_blend(log_p, log_p, beta)
    with pytest.raises(TrimtabError, match=r"beta has shape \[3\]"):
        geometric_blend(log_p, log_p, torch.zeros(3))
    with pytest.raises(TrimtabError, match="no outcome in common"):
        geometric_blend(torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0]), 0.5)
    for rate in (0.0, -0.2, 1.5, math.nan):
        with pytest.raises(TrimtabError, match=f"rate={rate}"):
            truncated_geometric(rate, 3)
    for prior in (lambda n: truncated_geometric(0.5, n), lambda n: noncentral_chi2(6, n)):
        with pytest.raises(TrimtabError, match="n=0"):
            prior(0)
    with pytest.raises(TrimtabError, match="df=0"):
        noncentral_chi2(0, 3)
    with pytest.raises(TrimtabError, match="noncentrality=-1"):
        noncentral_chi2(6, 3, noncentrality=-1)
