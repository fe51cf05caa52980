"""The loss of on-policy distillation: identities, gradients against the formulas, brute force, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import kl
from trimtab.distill.functional import reverse_kl, reverse_kl_from_statistics, topk_statistics

TRUNCATED = ("topk_renorm", "topk_tail", "topk_pg")
ALL = ("full", *TRUNCATED)


def pair(*batch: int, vocab: int = 9, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*batch, vocab, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), of)[0]


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", TRUNCATED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_all_tokens_the_truncated_ones_are_the_whole(estimator: str, temperature: float) -> None:
    student, teacher = pair(3, 4)
    full = reverse_kl(student, teacher, temperature=temperature)
    cut = reverse_kl(student, teacher, estimator=estimator, k=9, temperature=temperature)
    torch.testing.assert_close(cut, full, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(cut, student), gradient(full, student), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ALL)
def test_of_equal_models_is_zero_with_zero_gradient(estimator: str) -> None:
    student, _ = pair(5)
    value = reverse_kl(student, student.detach(), estimator=estimator, k=4)
    assert value.abs().max() < 1e-15
    assert gradient(value, student).abs().max() < 1e-15


@pytest.mark.parametrize("estimator", ALL)
def test_no_gradient_reaches_the_teacher(estimator: str) -> None:
    student, teacher = pair(5)
    reverse_kl(student, teacher, estimator=estimator, k=4).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_tail_bounds_the_whole_from_below_and_grows_with_k() -> None:
    student, teacher = pair(50, vocab=12)
    full = reverse_kl(student, teacher)
    tails = [reverse_kl(student, teacher, estimator="topk_tail", k=k) for k in range(1, 13)]
    assert all((tail >= 0).all() for tail in tails)
    assert all((wide >= narrow - 1e-12).all() for narrow, wide in zip(tails, [*tails[1:], full], strict=True))


@pytest.mark.parametrize("estimator", TRUNCATED)
def test_statistics_are_all_that_is_needed_of_the_teacher(estimator: str) -> None:
    student, teacher = pair(3, 4)
    ids, log_q = topk_statistics(student, teacher, 4, 0.8)
    assert ids.shape == log_q.shape == (3, 4, 4)
    torch.testing.assert_close(log_q, (teacher / 0.8).log_softmax(-1).gather(-1, ids))
    assert not log_q.requires_grad
    given = reverse_kl_from_statistics(student, ids, log_q, estimator=estimator, temperature=0.8)
    whole = reverse_kl(student, teacher, estimator=estimator, k=4, temperature=0.8)
    assert given.equal(whole)
    assert gradient(given, student).equal(gradient(whole, student))


# -- the formulas, written out ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
def test_value_is_the_formula(estimator: str) -> None:
    student, teacher = pair(1, seed=3)
    p, q = student[0].softmax(-1).tolist(), teacher[0].softmax(-1).tolist()
    top = sorted(range(9), key=lambda v: -p[v])[:3]
    p_s, q_s = sum(p[v] for v in top), sum(q[v] for v in top)
    formulas = {
        "full": sum(p[v] * math.log(p[v] / q[v]) for v in range(9)),
        "topk_renorm": sum(p[v] / p_s * math.log(p[v] / p_s / (q[v] / q_s)) for v in top),
        "topk_tail": sum(p[v] * math.log(p[v] / q[v]) for v in top) + (1 - p_s) * math.log((1 - p_s) / (1 - q_s)),
        "topk_pg": sum(p[v] / p_s * math.log(p[v] / q[v]) for v in top),
    }
    assert reverse_kl(student, teacher, estimator=estimator, k=3).item() == pytest.approx(
        formulas[estimator], rel=1e-12
    )


def test_gradient_of_the_whole_is_p_times_what_exceeds_the_mean() -> None:
    student, teacher = pair(6)
    value = reverse_kl(student, teacher, temperature=0.5)
    log_p, log_q = (student / 0.5).log_softmax(-1), (teacher / 0.5).log_softmax(-1)
    expected = log_p.exp() * (log_p - log_q - value.unsqueeze(-1)) / 0.5
    torch.testing.assert_close(gradient(value, student), expected.detach(), rtol=1e-12, atol=1e-14)


def test_the_whole_is_cores_divergence_and_autograds_gradient() -> None:
    student, teacher = pair(6, dtype=torch.float32)
    masked = torch.tensor([2, 3])
    logits = student.index_fill(-1, masked, -torch.inf), teacher.detach().index_fill(-1, masked[:1], -torch.inf)
    reference = kl(*((x / 0.5).log_softmax(-1) for x in logits))
    value = reverse_kl(*logits, temperature=0.5)
    torch.testing.assert_close(value, reference)
    weights = torch.arange(1.0, 7.0)
    slopes = [torch.autograd.grad((weights * x).sum(), student, retain_graph=True)[0] for x in (value, reference)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert reverse_kl(*logits, temperature=0.5).equal(value)


def test_gradient_of_the_surrogate_is_the_policy_gradient() -> None:
    student, teacher = pair(6)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    top = student.topk(3, dim=-1).indices
    p_top = log_p.gather(-1, top)
    weight = p_top.softmax(-1).detach()
    cost = (p_top - log_q.gather(-1, top)).detach()
    expected = gradient((weight * cost * p_top).sum(-1), student)
    surrogate = gradient(reverse_kl(student, teacher, estimator="topk_pg", k=3), student)
    torch.testing.assert_close(surrogate, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(surrogate, gradient(reverse_kl(student, teacher, estimator="topk_renorm", k=3), student))


@pytest.mark.parametrize("estimator", ["full", "topk_renorm", "topk_tail"])
def test_gradients_are_those_of_the_values(estimator: str) -> None:
    student, teacher = pair(2, vocab=6)
    assert gradcheck(lambda x: reverse_kl(x, teacher, estimator=estimator, k=3), student)


def test_a_step_down_each_gradient_brings_the_student_nearer() -> None:
    for estimator in ALL:
        student, teacher = pair(8)
        step = gradient(reverse_kl(student, teacher, estimator=estimator, k=6), student)
        before, after = (reverse_kl(x, teacher).sum() for x in (student, student - 1e-3 * step))
        assert after < before, estimator


# -- masked ids and number formats -----------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("k", [3, 9])
def test_masked_ids_are_as_if_they_were_not_there(estimator: str, k: int) -> None:
    student, teacher = pair(4)
    masked = torch.tensor([1, 5])
    rest = torch.tensor([0, 2, 3, 4, 6, 7, 8])
    value = reverse_kl(
        student.index_fill(-1, masked, -torch.inf), teacher.index_fill(-1, masked, -torch.inf), estimator=estimator, k=k
    )
    without = reverse_kl(student[:, rest], teacher[:, rest], estimator=estimator, k=min(k, 7))
    torch.testing.assert_close(value, without, rtol=1e-12, atol=1e-13)
    slope, slope_without = gradient(value, student), gradient(without, student)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope, slope_without, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ALL)
def test_mass_on_what_the_teacher_masks_is_infinitely_far_and_has_no_gradient(estimator: str) -> None:
    student, teacher = pair(2)
    best = student[0].argmax()
    masking = teacher.detach().clone()
    masking[0, best] = -torch.inf
    value = reverse_kl(student, masking, estimator=estimator, k=3)
    assert value[0] == torch.inf
    assert value[1].isfinite()
    slope = gradient(value, student)
    assert slope[0].eq(0).all()
    assert slope[1].isfinite().all()
    nothing_in_common = torch.full((1, 9), -torch.inf, dtype=torch.float64)
    nothing_in_common[0, student[0].argmin()] = 0.0
    assert reverse_kl(student[:1], nothing_in_common, estimator=estimator, k=3).item() == torch.inf


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_float32_or_better(estimator: str, dtype: torch.dtype) -> None:
    student, teacher = pair(4, vocab=300, dtype=dtype)
    value = reverse_kl(student, teacher, estimator=estimator)
    assert value.dtype == torch.float32
    exact = reverse_kl(student.double(), teacher.double(), estimator=estimator)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert gradient(value, student).dtype == dtype


@pytest.mark.parametrize("estimator", ALL)
def test_a_certain_student_gives_finite_gradients(estimator: str) -> None:
    student = torch.tensor([[80.0, 0, -80, -80, 0]], requires_grad=True)
    value = reverse_kl(student, torch.tensor([[0.0, 1, 2, 3, 4]]), estimator=estimator, k=5)
    assert value.isfinite().all()
    assert gradient(value, student).isfinite().all()


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name() -> None:
    student, teacher = pair(2)
    with pytest.raises(TrimtabError, match=r"shapes \[2, 9\] and \[2, 8\]"):
        reverse_kl(student, teacher[:, :8])
    with pytest.raises(TrimtabError, match=r"estimator='sampled' is not known.* full, topk_renorm"):
        reverse_kl(student, teacher, estimator="sampled")
    for k in (0, 10):
        with pytest.raises(TrimtabError, match=rf"k={k} must lie in 1\.\.9"):
            reverse_kl(student, teacher, estimator="topk_tail", k=k)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        for estimator in ("full", "topk_pg"):
            with pytest.raises(TrimtabError, match="temperature="):
                reverse_kl(student, teacher, estimator=estimator, k=2, temperature=temperature)
    ids, log_q = topk_statistics(student, teacher, 3)
    with pytest.raises(TrimtabError, match=r"estimator='full' is not known.* topk_renorm"):
        reverse_kl_from_statistics(student, ids, log_q, estimator="full")
    with pytest.raises(TrimtabError, match=r"\[2, 3\] and \[2, 2\]: both must be \[2, 'k'\]"):
        reverse_kl_from_statistics(student, ids, log_q[:, :2], estimator="topk_tail")
