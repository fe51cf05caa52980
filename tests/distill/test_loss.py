"""The loss of hidden states: against the formulas on whole logits, TRL's own, gradients, precision, heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from trimtab.core.simplex import entropy
from trimtab.distill import loss as loss_module
from trimtab.distill.eos import StopIds, canonicalise
from trimtab.distill.functional import Estimator, reverse_kl, topk_statistics
from trimtab.distill.loss import Comparison, Head, reverse_kl_of_hidden, reverse_kl_of_statistics, teacher_view

VOCAB, POSITIONS = 11, 7
STOPS = StopIds((2, 4), (5, 2))


def made(dtype: torch.dtype = torch.float64, teacher_vocab: int = VOCAB) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": normal(POSITIONS, 6),
        "weight": normal(VOCAB, 6),
        "bias": normal(VOCAB),
        "teacher_hidden": normal(POSITIONS, 8),
        "teacher_weight": normal(teacher_vocab, 8),
    }


def heads(x: dict[str, Tensor], scale: float = 0.7, softcap: float | None = 3.0) -> tuple[Head, Head]:
    return Head(x["weight"], x["bias"], scale, softcap), Head(x["teacher_weight"], None, 1.3, None)


def whole_logits(x: dict[str, Tensor], scale: float = 0.7, softcap: float = 3.0) -> tuple[Tensor, Tensor]:
    ours = softcap * torch.tanh((x["hidden"] @ x["weight"].T + x["bias"]) * scale / softcap)
    return ours, (x["teacher_hidden"] @ x["teacher_weight"].T) * 1.3


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"chunks of {rows}")
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_LOGITS", request.param * VOCAB)


# -- the formulas, on logits that are never stored whole -------------------------------------------


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("stop_ids", [None, STOPS], ids=["same stop", "other stop"])
@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_value_and_gradients_are_those_of_whole_logits(estimator: str, stop_ids: StopIds | None) -> None:
    x, y = made(teacher_vocab=VOCAB + 2), made(teacher_vocab=VOCAB + 2)
    size = VOCAB - 1
    comparison = Comparison(estimator, 4, 1.7, stop_ids, size)
    total, entropies = reverse_kl_of_hidden(x["hidden"], heads(x)[0], x["teacher_hidden"], heads(x)[1], comparison)
    ours, theirs = canonicalise(*(logits / 1.7 for logits in whole_logits(y)), stop_ids, size)
    wanted = reverse_kl(ours, theirs, estimator=estimator, k=4)
    torch.testing.assert_close(total, wanted.sum())
    torch.testing.assert_close(entropies, entropy(ours.log_softmax(-1)).detach())
    (3 * total).backward()
    (3 * wanted.sum()).backward()
    for name in ("hidden", "weight", "bias"):
        assert y[name].grad is not None
        torch.testing.assert_close(x[name].grad, y[name].grad, msg=name)
    assert x["teacher_hidden"].grad is None
    assert x["teacher_weight"].grad is None


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("estimator", get_args(Estimator)[1:])
def test_recorded_statistics_stand_for_the_teacher(estimator: str) -> None:
    x, y = made(), made()
    comparison = Comparison(estimator, 4, 1.7, STOPS)
    alike = comparison.alike(*(logits.detach() for logits in whole_logits(x)))
    statistics = topk_statistics(*alike, 4)
    total, entropies = reverse_kl_of_statistics(x["hidden"], heads(x)[0], *statistics, comparison)
    wanted, other = reverse_kl_of_hidden(y["hidden"], heads(y)[0], y["teacher_hidden"], heads(y)[1], comparison)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(entropies, other)
    total.backward()
    wanted.backward()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(x[name].grad, y[name].grad, msg=name)


def test_one_vocabulary_and_one_stop_is_trls_own_loss() -> None:
    x, y = made(torch.float32), made(torch.float32)
    total, entropies = reverse_kl_of_hidden(
        x["hidden"], heads(x)[0], x["teacher_hidden"], heads(x)[1], Comparison("full", temperature=1.7)
    )
    wanted, entropy_sum, n = _chunked_divergence_loss(
        y["hidden"][None],
        y["teacher_hidden"][None],
        y["weight"],
        y["teacher_weight"],
        torch.ones(1, POSITIONS),
        beta=1.0,
        student_lm_head_bias=y["bias"],
        student_logit_scale=0.7,
        student_final_logit_softcapping=3.0,
        teacher_logit_scale=1.3,
        temperature=1.7,
    )
    torch.testing.assert_close(total / n, wanted)
    torch.testing.assert_close(entropies.sum(), entropy_sum)
    (total / n).backward()
    wanted.backward()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(x[name].grad, y[name].grad, msg=name, rtol=1e-5, atol=1e-6)


def test_gradient_by_finite_differences() -> None:
    x = made()

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head, teacher = Head(weight, bias, 0.7, 3.0), heads(x)[1]
        return reverse_kl_of_hidden(hidden, head, x["teacher_hidden"], teacher, Comparison("full", stop_ids=STOPS))[0]

    assert torch.autograd.gradcheck(value, (x["hidden"], x["weight"], x["bias"]))


def test_the_teacher_itself_has_no_divergence_and_no_gradient() -> None:
    x = made()
    student = Head(x["weight"], x["bias"])
    for estimator in get_args(Estimator):
        hidden = x["hidden"].detach().requires_grad_()
        total, _ = reverse_kl_of_hidden(hidden, student, x["hidden"].detach(), student, Comparison(estimator, 4))
        total.backward()
        assert total.item() == pytest.approx(0, abs=1e-12), estimator
        assert float(hidden.grad.abs().max()) < 1e-12, estimator


# -- what is kept, and in which precision ----------------------------------------------------------


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.numbers = max(self.numbers, made.numel())
        return out


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_no_more_logits_than_a_chunk_has_are_made_or_kept(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, vocab, d, rows = 60, 1000, 3, 6
    monkeypatch.setattr(loss_module, "_LOGITS", rows * vocab)
    hidden, weight = torch.randn(positions, d, requires_grad=True), torch.randn(vocab, d, requires_grad=True)
    with Largest() as largest:
        total, _ = reverse_kl_of_hidden(
            hidden, Head(weight), torch.randn(positions, d), Head(torch.randn(vocab, d)), Comparison(estimator)
        )
        assert total.grad_fn is not None
        kept = [tuple(tensor.shape) for tensor in total.grad_fn.saved_tensors if tensor is not None]
        total.backward()
    assert kept == [(positions, d), (vocab, d)]
    assert largest.numbers == rows * vocab


def test_frozen_heads_get_no_gradient_and_evaluation_needs_none() -> None:
    x = made()
    frozen = Head(x["weight"].detach(), x["bias"].detach(), 0.7, 3.0)
    wanted, _ = reverse_kl_of_hidden(x["hidden"], heads(x)[0], x["teacher_hidden"], heads(x)[1], Comparison())
    total, _ = reverse_kl_of_hidden(x["hidden"], frozen, x["teacher_hidden"], heads(x)[1], Comparison())
    total.backward()
    assert x["hidden"].grad is not None
    with torch.no_grad():
        alone, _ = reverse_kl_of_hidden(x["hidden"], heads(x)[0], x["teacher_hidden"], heads(x)[1], Comparison())
    assert not alone.requires_grad
    assert total.item() == wanted.item() == alone.item()


def test_no_position_is_no_loss_with_a_gradient_of_nothing() -> None:
    x = made()
    total, entropies = reverse_kl_of_hidden(
        x["hidden"][:0], heads(x)[0], x["teacher_hidden"][:0], heads(x)[1], Comparison()
    )
    total.backward()
    assert total.item() == 0
    assert entropies.shape == (0,)
    assert float(x["weight"].grad.abs().sum()) == 0


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_half_precision_is_projected_to_float32(estimator: str) -> None:
    """As autocast has it too, which would round log-softmax's input and the sum over the vocabulary."""
    x, y = made(torch.bfloat16), made(torch.bfloat16)
    exact = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    comparison = Comparison(estimator, 4, 1.0, STOPS)
    wanted, _ = reverse_kl_of_hidden(
        exact["hidden"], heads(exact)[0], exact["teacher_hidden"], heads(exact)[1], comparison
    )
    wanted.backward()
    total, _ = reverse_kl_of_hidden(x["hidden"], heads(x)[0], x["teacher_hidden"], heads(x)[1], comparison)
    total.backward()
    assert total.dtype == torch.float32
    full = {name: value.detach().float().requires_grad_() for name, value in y.items()}
    with torch.autocast("cpu", torch.bfloat16):
        same, _ = reverse_kl_of_hidden(
            full["hidden"], heads(full)[0], full["teacher_hidden"], heads(full)[1], comparison
        )
    same.backward()
    assert same.item() == total.item()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    for name in ("hidden", "weight", "bias"):
        assert x[name].grad.dtype == torch.bfloat16
        torch.testing.assert_close(x[name].grad.double(), exact[name].grad, rtol=2e-2, atol=2e-2)


# -- heads -----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "granite"])
def test_a_models_head_makes_its_logits(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "cohere":
        model: Any = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4, final_logit_softcapping=0.05))
    else:
        from transformers import GraniteForCausalLM

        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0))
    ids = torch.arange(VOCAB)[None]
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        head = Head.of(model)
        torch.testing.assert_close(head.logits(hidden, head.weight), model(ids).logits[0])
    assert (head.scale, head.softcap) != (1.0, None)


def test_scales_by_their_other_names() -> None:
    def head(**config: Any) -> Head:
        text = SimpleNamespace(**config)
        layer = torch.nn.Linear(2, 3, bias=False)
        model = SimpleNamespace(
            get_output_embeddings=lambda: layer, config=SimpleNamespace(get_text_config=lambda: text)
        )
        return Head.of(model)

    assert head().scale == 1.0
    assert head(logit_scale=0.0).scale == 0.0
    assert head(logit_scale=None, output_multiplier=2.0).scale == 2.0
    assert head(lm_head_multiplier=3.0).scale == 3.0
    assert head(logits_scaling=4.0, model_type="granite").scale == 0.25
    assert head(logits_scaling=4.0, model_type="hyperclovax").scale == 4.0


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    ("stop_ids", "written"), [(STOPS, 2), (StopIds((2, 4), (4, 2)), 4)], ids=["other stops", "the same stops"]
)
def test_the_teachers_view_of_tokens(stop_ids: StopIds, written: int) -> None:
    x = made()
    comparison = Comparison("full", temperature=1.7, stop_ids=stop_ids)
    log_q = comparison.alike(*whole_logits(x))[1].log_softmax(-1)
    tokens = torch.tensor([0, 1, 2, 3, 4, 6, 7])  # 4 stops the student too, and may be written as 2
    log_probs, entropies = teacher_view(x["teacher_hidden"], heads(x)[1], tokens, comparison)
    as_written = torch.tensor([0, 1, 2, 3, written, 6, 7])
    torch.testing.assert_close(log_probs, log_q[torch.arange(POSITIONS), as_written].detach())
    torch.testing.assert_close(entropies, entropy(log_q).detach())
