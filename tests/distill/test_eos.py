"""One vocabulary of two models': stop ids, padded heads, tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import trust_region_blend
from trimtab.distill.eos import StopIds, canonicalise, check_tokenizers, suppressed_ids
from trimtab.distill.functional import reverse_kl


def pair(*batch: int, student: int = 8, teacher: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*batch, student, generator=generator, dtype=torch.float64),
        torch.randn(*batch, teacher, generator=generator, dtype=torch.float64),
    )


# -- stop ids --------------------------------------------------------------------------------------


def test_with_the_same_stops_nothing_changes_and_nothing_is_copied() -> None:
    student, teacher = pair(3)
    for stop_ids in (None, StopIds((2,), (2,)), StopIds((2, 5), (5, 2))):
        ours, theirs = canonicalise(student, teacher, stop_ids)
        assert ours.data_ptr() == student.data_ptr()
        assert theirs.data_ptr() == teacher.data_ptr()
        assert ours.equal(student)
        assert theirs.equal(teacher)


def test_each_models_stop_becomes_the_students_and_the_other_id_is_gone() -> None:
    student, teacher = pair(3, 2)
    before = student.clone(), teacher.clone()
    ours, theirs = canonicalise(student, teacher, StopIds((2,), (5,)))
    assert student.equal(before[0])
    assert teacher.equal(before[1])
    others = [0, 1, 3, 4, 6, 7]
    p, q = student.softmax(-1), teacher.softmax(-1)
    # The formula with probabilities: what a model gave to the other's stop is lost, and the rest renormalised.
    for new, old, own, lost in ((ours, p, 2, 5), (theirs, q, 5, 2)):
        new = new.softmax(-1)
        assert new[..., 5].eq(0).all()
        left = 1 - old[..., lost]
        torch.testing.assert_close(new[..., 2], old[..., own] / left)
        torch.testing.assert_close(new[..., others], old[..., others] / left.unsqueeze(-1))


def test_several_stop_ids_are_one_event_and_shared_ones_lose_nothing() -> None:
    student, teacher = pair(4)
    ours, theirs = canonicalise(student, teacher, StopIds((2,), (5, 2)))
    q = teacher.softmax(-1)
    torch.testing.assert_close(theirs.softmax(-1)[:, 2], q[:, 2] + q[:, 5])
    torch.testing.assert_close(theirs.softmax(-1)[:, 0], q[:, 0])
    p = student.softmax(-1)
    torch.testing.assert_close(ours.softmax(-1)[:, 2], p[:, 2] / (1 - p[:, 5]))
    ours, theirs = canonicalise(student, teacher, StopIds((2, 7), (7, 1)))
    assert ours[:, [1, 7]].eq(-torch.inf).all()
    assert theirs[:, [1, 7]].eq(-torch.inf).all()
    torch.testing.assert_close(ours.softmax(-1)[:, 2], (p[:, 2] + p[:, 7]) / (1 - p[:, 1]))
    torch.testing.assert_close(theirs.softmax(-1)[:, 2], (q[:, 1] + q[:, 7]) / (1 - q[:, 2]))


def test_the_blend_stops_by_both_models_own_stops_and_never_writes_the_teachers() -> None:
    student, teacher = pair(64)
    ours, theirs = canonicalise(student, teacher, StopIds((2,), (5,)))
    log_mu, beta, _ = trust_region_blend(ours, theirs, 0.05)
    assert ((beta > 0) & (beta < 1)).any()
    assert log_mu[:, 5].eq(-torch.inf).all()
    r = theirs - ours
    p = student.softmax(-1)
    odds = (1 - beta) * (p[:, 2] / p[:, 0]).log() + beta * (teacher[:, 5] - teacher[:, 0])
    torch.testing.assert_close(log_mu[:, 2] - log_mu[:, 0], odds)
    assert r[:, 5].isnan().all()


def test_gradients_reach_every_stop_id_and_are_finite() -> None:
    student, teacher = pair(4)
    student.requires_grad_()
    stop_ids = StopIds((2, 7), (5, 7))
    ours, theirs = canonicalise(student, teacher, stop_ids)
    for estimator in ("full", "topk_renorm", "topk_tail", "topk_pg"):
        (slope,) = torch.autograd.grad(
            reverse_kl(ours, theirs, estimator=estimator, k=6).sum(), student, retain_graph=True
        )
        assert slope.isfinite().all(), estimator
        assert slope[:, 5].eq(0).all()
        assert slope[:, [2, 7]].ne(0).all()
        # A model's stops share what their event gets, by their probabilities.
        share = student.detach()[:, [2, 7]].softmax(-1)
        torch.testing.assert_close(slope[:, [2, 7]], share * slope[:, [2, 7]].sum(-1, keepdim=True))


def test_masked_stops_have_finite_gradients() -> None:
    student, teacher = (logits.index_fill(-1, torch.tensor([2, 5, 7]), -torch.inf) for logits in pair(2))
    student.requires_grad_()
    ours, theirs = canonicalise(student, teacher, StopIds((2, 7), (2, 7, 5)))
    value = reverse_kl(ours, theirs)
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_what_a_student_alone_must_not_write() -> None:
    assert suppressed_ids(None, 8) == ()
    assert suppressed_ids(StopIds((2,), (2,)), 8) == ()
    assert suppressed_ids(StopIds((2, 7), (7, 5)), 8) == (5,)
    assert suppressed_ids(StopIds((2,), (5,)), 10, 8) == (5, 8, 9)
    with pytest.raises(TrimtabError, match=r"vocab_size=11 must lie in 1\.\.10"):
        suppressed_ids(None, 10, 11)


# -- vocabularies ----------------------------------------------------------------------------------


def test_padded_heads_are_cut_only_when_asked() -> None:
    student, teacher = pair(2, student=10, teacher=12)
    with pytest.raises(TrimtabError, match="over 10 and 12 ids"):
        canonicalise(student, teacher, None)
    ours, theirs = canonicalise(student, teacher, StopIds((2,), (5,)), 8)
    cut = canonicalise(student[:, :8], teacher[:, :8], StopIds((2,), (5,)))
    assert ours.equal(cut[0])
    assert theirs.equal(cut[1])
    with pytest.raises(TrimtabError, match=r"vocab_size=11 must lie in 1\.\.10"):
        canonicalise(student, teacher, None, 11)


def test_bad_stop_ids_are_refused() -> None:
    for ids in ((), (-1,), (3, 3)):
        with pytest.raises(TrimtabError, match="student="):
            StopIds(ids, (1,))
        with pytest.raises(TrimtabError, match="teacher="):
            StopIds((1,), ids)
    for stop_ids in (StopIds((8,), (1,)), StopIds((1,), (8,))):
        with pytest.raises(TrimtabError, match="must lie below 8"):
            canonicalise(*pair(2), stop_ids)
        with pytest.raises(TrimtabError, match="must lie below 8"):
            suppressed_ids(stop_ids, 8)


def test_tokenizers_are_compared_token_by_token() -> None:
    def tokenizer(*tokens: str) -> Any:
        return SimpleNamespace(get_vocab=lambda: {token: i for i, token in enumerate(tokens)})

    assert check_tokenizers(tokenizer("a", "b", "c"), tokenizer("a", "b", "c")) == 3
    with pytest.raises(TrimtabError, match="token id 1 is 'b' for the student and 'x' for the teacher"):
        check_tokenizers(tokenizer("a", "b", "c"), tokenizer("a", "x", "y"))
    assert check_tokenizers(tokenizer("a", "b", "c"), tokenizer("a", "b")) == 2
    assert check_tokenizers(tokenizer("a", "b"), tokenizer("a", "b", "c")) == 2


def test_a_tokenizer_knows_as_many_ids_as_its_model_has(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    assert check_tokenizers(tiny_tokenizer, tiny_tokenizer) == tiny_llama.config.vocab_size
