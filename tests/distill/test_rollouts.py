"""Rollout policies: the distributions against their descriptions, schedules, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import kl, trust_region_blend
from trimtab.distill.rollouts import (
    SKD,
    RolloutPolicy,
    TeacherMixture,
    TeacherOnly,
    TemperatureWarmup,
    TrustRegion,
    Vanilla,
    check_budget,
    check_whole,
)

ALL = [
    Vanilla(),
    TrustRegion(0.05, 4),
    TrustRegion(0.05, 4, "constant"),
    SKD(3),
    TemperatureWarmup(0.8, 4),
    TeacherMixture(0.2),
    TeacherOnly(4),
]


def pair(rows: int, vocab: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    return log_p, log_q


@pytest.mark.parametrize("policy", ALL, ids=str)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_every_behaviour_is_a_distribution_at_the_divergence_that_it_says(policy: RolloutPolicy, step: int) -> None:
    log_p, log_q = pair(16)
    behaviour = policy.log_behaviour(log_p, log_q, step)
    torch.testing.assert_close(behaviour.log_mu.logsumexp(-1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(behaviour.divergence, kl(behaviour.log_mu, log_p), rtol=1e-9, atol=1e-12)
    if not policy.needs_teacher(step):
        assert behaviour.log_mu.equal(log_p)
        assert behaviour.divergence.eq(0).all()


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_masked_tokens_stay_masked(policy: RolloutPolicy) -> None:
    masked = torch.tensor([1, 6])
    log_p, log_q = (x.index_fill(-1, masked, -torch.inf).log_softmax(-1) for x in pair(16))
    behaviour = policy.log_behaviour(log_p, log_q, 0)
    assert behaviour.log_mu[:, masked].eq(-torch.inf).all()
    assert not behaviour.log_mu.isnan().any()
    assert behaviour.divergence.isfinite().all()


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_what_the_student_may_not_write_is_not_written(policy: RolloutPolicy) -> None:
    """And the teacher is the one who may not write it either."""
    masked = torch.tensor([1, 6])
    log_p, log_q = pair(16)
    log_p = log_p.index_fill(-1, masked, -torch.inf).log_softmax(-1)
    behaviour = policy.log_behaviour(log_p, log_q, 0)
    assert behaviour.log_mu[:, masked].eq(-torch.inf).all()
    assert behaviour.divergence.isfinite().all()
    both = policy.log_behaviour(log_p, log_q.index_fill(-1, masked, -torch.inf).log_softmax(-1), 0)
    torch.testing.assert_close(behaviour.log_mu, both.log_mu)
    torch.testing.assert_close(behaviour.log_mu.logsumexp(-1), torch.zeros(16).double(), rtol=0, atol=1e-12)


# -- trust region ----------------------------------------------------------------------------------


def test_the_budget_falls_linearly_to_zero() -> None:
    policy = TrustRegion(0.02, 4)
    assert [policy.budget(step) for step in range(6)] == [0.02, 0.015, 0.01, 0.005, 0.0, 0.0]
    assert [policy.needs_teacher(step) for step in range(6)] == [True] * 4 + [False] * 2
    assert [TrustRegion(0.02, 0).budget(step) for step in range(3)] == [0.0, 0.0, 0.0]
    assert not TrustRegion(0.0, 50).needs_teacher(0)
    constant = TrustRegion(0.02, 4, "constant")
    assert [constant.budget(step) for step in (0, 3, 4, 1000)] == [0.02] * 4


def test_the_trust_region_is_that_of_the_budget_of_the_step() -> None:
    log_p, log_q = pair(32)
    behaviour = TrustRegion(0.08, 4).log_behaviour(log_p, log_q, 3)
    log_mu, beta, divergence = trust_region_blend(log_p, log_q, 0.02)
    torch.testing.assert_close(behaviour.log_mu, log_mu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(behaviour.blend_weight, beta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(behaviour.divergence, divergence, rtol=1e-9, atol=1e-9)


def test_no_other_policy_at_the_same_divergence_is_as_near_to_the_teacher() -> None:
    log_p, log_q = pair(64)
    for policy in (SKD(3), TeacherMixture(0.2), TeacherMixture(0.7)):
        other = policy.log_behaviour(log_p, log_q, 0)
        nearest, _, divergence = trust_region_blend(log_p, log_q, other.divergence)
        assert (divergence <= other.divergence + 1e-9).all()
        assert (kl(nearest, log_q) <= kl(other.log_mu, log_q) + 1e-6).all()
        assert (kl(nearest, log_q) < kl(other.log_mu, log_q) - 1e-3).any()


# -- baselines -------------------------------------------------------------------------------------


def test_skd_is_what_proposing_and_replacing_does() -> None:
    log_p, log_q = pair(1, seed=1)
    draws, generator = 200_000, torch.Generator().manual_seed(0)
    proposed = torch.multinomial(log_p[0].exp(), draws, replacement=True, generator=generator)
    replacement = torch.multinomial((log_q[0] / 0.6).softmax(-1), draws, replacement=True, generator=generator)
    accepted = torch.isin(proposed, log_q[0].topk(3).indices)
    assert 0.2 < accepted.double().mean() < 0.8
    counts = torch.where(accepted, proposed, replacement).bincount(minlength=8)
    expected = draws * SKD(3, 0.6).log_behaviour(log_p, log_q, 0).log_mu[0].exp()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 0.1 % of a chi-square with 7 degrees of freedom


def test_skd_whose_top_is_everything_is_the_student() -> None:
    log_p, log_q = pair(5)
    for top_k in (8, 100):
        torch.testing.assert_close(SKD(top_k).log_behaviour(log_p, log_q, 0).log_mu, log_p)


def test_the_mixture_is_the_mean_of_probabilities() -> None:
    log_p, log_q = pair(5)
    mixed = TeacherMixture(0.2).log_behaviour(log_p, log_q, 9).log_mu
    torch.testing.assert_close(mixed.exp(), 0.2 * log_q.exp() + 0.8 * log_p.exp())
    torch.testing.assert_close(TeacherMixture(1).log_behaviour(log_p, log_q, 0).log_mu, log_q)
    assert not TeacherMixture(0).needs_teacher(0)


def test_the_teacher_alone_writes_for_some_steps() -> None:
    log_p, log_q = pair(5)
    assert TeacherOnly(2).log_behaviour(log_p, log_q, 1).log_mu.equal(log_q)
    assert [TeacherOnly(2).needs_teacher(step) for step in range(4)] == [True, True, False, False]


def test_the_temperature_rises_to_one() -> None:
    assert [TemperatureWarmup(0.8, 4).temperature(step) for step in range(6)] == pytest.approx(
        [0.8, 0.85, 0.9, 0.95, 1.0, 1.0]
    )
    assert TemperatureWarmup(0.8, 4).temperature(4) == 1.0
    assert TemperatureWarmup(0.8, 0).temperature(0) == 1.0
    assert all(policy.temperature(0) == 1.0 for policy in ALL if not isinstance(policy, TemperatureWarmup))


# -- bad input -------------------------------------------------------------------------------------


def test_bad_settings_are_refused_by_name() -> None:
    for epsilon in (-0.1, math.nan, math.inf):
        with pytest.raises(TrimtabError, match="epsilon="):
            TrustRegion(epsilon)
    with pytest.raises(TrimtabError, match="warmup_steps=-1 must be a whole number, 0 or more"):
        TrustRegion(warmup_steps=-1)
    for steps in (2.5, math.nan, "3"):
        with pytest.raises(TrimtabError, match=f"steps={steps!r} must be a whole number, 0 or more"):
            check_whole("steps", steps)
    with pytest.raises(TrimtabError, match=r"epsilon='0\.1' must be finite"):
        check_budget("epsilon", "0.1")
    with pytest.raises(TrimtabError, match="schedule='cosine' is not known"):
        TrustRegion(schedule="cosine")
    with pytest.raises(TrimtabError, match="top_k=0"):
        SKD(0)
    with pytest.raises(TrimtabError, match="teacher_temperature=0"):
        SKD(3, 0)
    with pytest.raises(TrimtabError, match="initial=-1"):
        TemperatureWarmup(-1)
    with pytest.raises(TrimtabError, match="steps=-1"):
        TemperatureWarmup(0.8, -1)
    with pytest.raises(TrimtabError, match="steps=-1"):
        TeacherOnly(-1)
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(TrimtabError, match="teacher_weight="):
            TeacherMixture(weight)
