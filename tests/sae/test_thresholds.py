"""Thresholds that train (arXiv 2407.14435): closed form against autograd with the same estimator, and whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.sparse_codes import Compositional
from trimtab.sae import DictionaryConfig, JumpReLUSAE, TensorShards, TopKSAE, TrainingConfig, kernels, train
from trimtab.sae.functional import Weights, loss_and_gradients
from trimtab.sae.metrics import reconstruction
from trimtab.sae.thresholds import BANDWIDTH, PENALTY, Thresholds, jump_top

TOKENS, N, D, K = 50, 41, 9, 6


class Jump(torch.autograd.Function):
    """a H(a - theta), with the paper's pseudo-gradient in theta."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(a, theta, eps)
        return a * (a > theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, theta, eps = ctx.saved_tensors
        rectangle = (((a - theta) / eps).abs() < 0.5).double()
        return gradient * (a > theta), -(theta / eps * rectangle * gradient).sum(0), None


class Step(torch.autograd.Function):
    """H(a - theta), with the paper's pseudo-gradient in theta and none in a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(a, theta, eps)
        return (a > theta).double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, theta, eps = ctx.saved_tensors
        rectangle = (((a - theta) / eps).abs() < 0.5).double()
        return None, -(rectangle / eps * gradient).sum(0), None


def problem(seed: int = 0) -> tuple[Tensor, Weights, Thresholds]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, D), (N,), (N, D), (D,)]
    weights = Weights(*(torch.randn(shape, generator=generator).double() for shape in shapes))
    thresholds = Thresholds(N, dtype=torch.float64)
    with torch.no_grad():
        thresholds.log.copy_(torch.randn(N, generator=generator))
    return torch.randn(TOKENS, D, generator=generator).double(), weights, thresholds


@pytest.mark.parametrize("subtract_bias", [True, False])
@pytest.mark.parametrize("block", [None, 7 * N])
def test_closed_form_equals_autograd(subtract_bias: bool, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:
        monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", block)  # blocks of tokens with unequal numbers of slots
    x, weights, thresholds = problem()
    leaves = Weights(*(weight.clone().requires_grad_() for weight in weights))
    log = thresholds.log.detach().clone().requires_grad_()
    theta = log.exp()
    eps = (BANDWIDTH * theta).detach()
    a = (x - leaves.decoder_bias * subtract_bias) @ leaves.encoder.T + leaves.encoder_bias
    f = Jump.apply(a, theta, eps)
    l0 = Step.apply(a, theta, eps).sum(-1).mean()
    error = x - f @ leaves.decoder - leaves.decoder_bias
    loss = error.square().sum(-1).mean() / 7.3
    (loss + PENALTY * (l0 / K - 1).square()).backward()
    assert 1 < l0 < N

    gradients = Weights(*(torch.full_like(weight, torch.nan) for weight in weights))
    thresholds.d_loss.fill_(torch.nan)
    thresholds.d_l0.fill_(torch.nan)
    found = loss_and_gradients(
        x,
        x,
        weights,
        gradients,
        k=K,
        variance=7.3,
        sparsifier="jumprelu",
        thresholds=thresholds,
        subtract_bias=subtract_bias,
    )
    torch.testing.assert_close(found.loss, loss.detach())
    for name, mine, leaf in zip(Weights._fields, gradients, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, msg=name)
    found_l0 = (found.latents.values > 0).sum().item() / TOKENS
    assert found_l0 == pytest.approx(l0.item())
    assert log.grad is not None
    assert (log.grad != 0).sum() > N / 2
    torch.testing.assert_close(thresholds.gradient(found_l0, K), log.grad)


def test_latents_are_those_above_their_threshold_and_slots_those_of_the_fullest_token() -> None:
    x, weights, thresholds = problem()
    latents, _ = jump_top(x, weights.encoder, weights.encoder_bias, thresholds)
    a = x @ weights.encoder.T + weights.encoder_bias
    dense = torch.zeros_like(a).scatter_add(1, latents.indices, latents.values)
    torch.testing.assert_close(dense, a * (a > thresholds.value))
    assert latents.values.shape[1] == int((a > thresholds.value * (1 - BANDWIDTH / 2)).sum(1).max())


def test_where_nothing_is_near_a_threshold_nothing_fires_and_nothing_pulls() -> None:
    x, weights, thresholds = problem()
    with torch.no_grad():
        thresholds.log.fill_(20.0)
    latents, pullback = jump_top(x, weights.encoder, weights.encoder_bias, thresholds)
    assert latents.values.shape == (TOKENS, 1)
    assert not latents.values.any()
    d_pre, _ = pullback(torch.ones_like(latents.values))
    assert not d_pre.any()
    assert not thresholds.d_loss.any()
    assert not thresholds.d_l0.any()


def test_too_many_latents_raise_thresholds_and_too_few_lower_them() -> None:
    for l0, sign in ((2.0 * K, 1), (0.5 * K, -1)):
        thresholds = Thresholds(3)
        thresholds.d_l0.copy_(torch.tensor([-1.0, -2.0, 0.0]))
        thresholds.step(0.01, l0, K)
        assert (thresholds.log.detach() * sign).tolist() == pytest.approx([0.01, 0.01, 0.0], abs=1e-6)


# -- runs ------------------------------------------------------------------------------------------

BED = Compositional(groups=6, d=24)


def settings(**changes: Any) -> TrainingConfig:
    values = {"tokens": 38_400, "batch_size": 128, "learning_rate": 8e-3, "dead_after": 12_800, "checkpoint_every": 150}
    return TrainingConfig(**(values | changes))


def dictionary(**changes: Any) -> DictionaryConfig:
    return DictionaryConfig(**({"place": "x", "n_latents": 128, "k": 4, "sparsifier": "jumprelu"} | changes))


@pytest.mark.parametrize("subtract", [True, False])
def test_a_run_reaches_its_l0_and_what_topk_explains(subtract: bool, tmp_path: Path) -> None:
    shards, test = TensorShards({"x": 30 * BED.sample(38_400, seed=1) + 7}), 30 * BED.sample(4096, seed=2) + 7
    run = settings(apply_b_dec_to_input=subtract)
    found = {}
    for kind in ("jumprelu", "topk"):
        sae = train([dictionary(sparsifier=kind)], shards, run, tmp_path / kind)["x"]
        found[kind] = reconstruction(sae, test)
    assert found["jumprelu"]["l0"] == pytest.approx(4, rel=0.2)
    assert found["jumprelu"]["explained_variance"] > found["topk"]["explained_variance"] - 0.01
    back = TopKSAE.from_pretrained(tmp_path / "jumprelu" / "x")
    assert isinstance(back, JumpReLUSAE)
    assert (back.threshold > 0).all()
    assert len(back.threshold.unique()) > 100  # each its own
    history = (tmp_path / "jumprelu" / "history.json").read_text()
    assert "l0" in history


def test_thresholds_are_learned_in_the_middle_of_a_run_as_in_one_go(tmp_path: Path) -> None:
    shards, run = TensorShards({"x": BED.sample(10_000, seed=1)}), settings(tokens=12_800, checkpoint_every=50)
    whole = train([dictionary()], shards, run, tmp_path / "whole")["x"]
    copied = tmp_path / "part" / "checkpoints" / "step-00000050"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / copied.name, copied)
    resumed = train([dictionary()], shards, run, tmp_path / "part")["x"]
    assert isinstance(resumed, JumpReLUSAE)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("subtract", [True, False])
def test_fine_tuning_starts_from_thresholds_that_are_there(subtract: bool, tmp_path: Path) -> None:
    rows = 30 * BED.sample(10_000, seed=1) + 7
    shards, run = TensorShards({"x": rows}), settings(tokens=12_800, apply_b_dec_to_input=subtract)
    old = train([dictionary()], shards, run, tmp_path / "old")["x"]
    still = settings(tokens=128, learning_rate=1e-12, final_learning_rate=0.0, apply_b_dec_to_input=subtract)
    again = dictionary(start=str(tmp_path / "old" / "x"))
    tuned = train([again], shards, still, tmp_path / "tuned")["x"]
    assert isinstance(old, JumpReLUSAE)
    assert isinstance(tuned, JumpReLUSAE)
    torch.testing.assert_close(tuned.threshold, old.threshold, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(tuned(rows[:200]), old(rows[:200]), atol=1e-2, rtol=1e-3)


def test_fine_tuning_finds_thresholds_where_there_are_none(tmp_path: Path) -> None:
    shards = TensorShards({"x": BED.sample(10_000, seed=1)})
    train([dictionary(sparsifier="topk")], shards, settings(tokens=12_800), tmp_path / "old")
    still = settings(tokens=128, learning_rate=1e-12, final_learning_rate=0.0)
    tuned = train([dictionary(start=str(tmp_path / "old" / "x"))], shards, still, tmp_path / "tuned")["x"]
    assert reconstruction(tuned, BED.sample(4096, seed=2))["l0"] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(
    "options", [{"kron": (2, 4)}, {"base": "b"}, {"extend": "b"}, {"objective": "matryoshka", "budgets": (8, 128)}]
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TrimtabError, match="jumprelu has no meaning with kron, base, extend"):
        dictionary(**options)


def test_another_precision_is_refused(tmp_path: Path) -> None:
    shards = TensorShards({"x": BED.sample(1_000, seed=1)})
    with pytest.raises(TrimtabError, match="precision='screened'; accepted for jumprelu: 'float32'"):
        train([dictionary()], shards, settings(precision="screened"), tmp_path)
