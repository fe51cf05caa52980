"""BatchTopK and thresholds, and SAE Boost (arXiv 2507.12990): its oracles."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae import (
    BoostedSAE,
    DictionaryConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    Mixture,
    TensorShards,
    TopKSAE,
    TopKSAEConfig,
    TrainingConfig,
    kernels,
    train,
)
from trimtab.sae.boost_report import BoostReport, boost_report
from trimtab.sae.boosted import _check_residual, other_origin
from trimtab.sae.encodings import DenseEncoding
from trimtab.sae.formats import export_saelens
from trimtab.sae.functional import Weights, loss_and_gradients
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.jumprelu import BatchThreshold
from trimtab.sae.metrics import Evaluation, ev_curve, reconstruction
from trimtab.sae.selection import batch_top

D, N = 12, 40


def rows(tokens: int = 60, seed: int = 0, d: int = D) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))


def randomised(sae: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
    return sae


def jump(seed: int = 3, **changes: Any) -> JumpReLUSAE:
    return randomised(JumpReLUSAE(JumpReLUSAEConfig(**{"d_in": D, "n_latents": N, **changes})), seed)


def residual(seed: int = 5, n_latents: int = 8) -> JumpReLUSAE:
    sae = jump(seed, n_latents=n_latents, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.decoder_bias.zero_()
    return sae


def topk() -> TopKSAE:
    return randomised(TopKSAE(TopKSAEConfig(d_in=D, n_latents=N, k=4)))


# -- BatchTopK -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("skew", [0.0, 20.0])
def test_batch_topk_keeps_the_largest_of_the_whole_batch(k: int, skew: float) -> None:
    x, encoder, bias = rows(), rows(N, 1), torch.zeros(N)
    x[0] *= 1 + skew  # one token that would take all that its candidates allow
    latents, _ = batch_top(DenseEncoding(), x, encoder, bias, k, N)
    a = (x @ encoder.T).relu()
    cut = a.flatten().topk(k * 60).values.min()
    expected = a * (a >= cut)
    found = torch.zeros_like(a).scatter_add(1, latents.indices, latents.values)
    torch.testing.assert_close(found, expected)
    assert int((latents.values > 0).sum()) == k * 60
    assert latents.values.shape[1] == int((expected > 0).sum(1).max())


def test_batch_topk_with_too_few_positive_entries_is_relu() -> None:
    x, encoder = rows(), rows(N, 1)
    bias = torch.full((N,), -5.0)
    latents, _ = batch_top(DenseEncoding(), x, encoder, bias, 10, N)
    a = (x @ encoder.T + bias).relu()
    assert 0 < (a > 0).sum() < 600
    torch.testing.assert_close(torch.zeros_like(a).scatter_add(1, latents.indices, latents.values), a)


def test_the_order_of_a_batch_does_not_matter() -> None:
    x, encoder, order = rows(), rows(N, 1), torch.randperm(60, generator=torch.Generator().manual_seed(2))
    dense = []
    for part in (x, x[order]):
        latents, _ = batch_top(DenseEncoding(), part, encoder, torch.zeros(N), 3, N)
        dense.append(torch.zeros(60, N).scatter_add(1, latents.indices, latents.values))
    torch.testing.assert_close(dense[1], dense[0][order])


def test_gradients_of_batch_topk_are_those_of_a_fixed_selection() -> None:
    x, k = rows().double(), 3
    w = Weights(*(t.double() for t in (rows(N, 1), rows(1, 2, N)[0], rows(N, 4), rows(1, 6)[0])))
    gradients = Weights(*(torch.full_like(t, torch.nan) for t in w))
    found = loss_and_gradients(x, x, w, gradients, k=k, variance=7.0, sparsifier="batch_topk")
    leaves = Weights(*(t.clone().requires_grad_() for t in w))
    a = ((x - leaves.decoder_bias) @ leaves.encoder.T + leaves.encoder_bias).relu()
    kept = a * (a >= a.flatten().topk(k * 60).values.min())
    loss = (x - kept @ leaves.decoder - leaves.decoder_bias).square().sum(-1).mean() / 7.0
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    for mine, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(mine, leaf.grad)


def test_the_threshold_is_the_mean_of_the_smallest_kept_without_the_pull_of_its_start() -> None:
    threshold = BatchThreshold(rate=0.1)
    assert threshold.value == 0
    threshold.update(math.inf)
    assert threshold.value == 0
    for _ in range(3):
        threshold.update(2.0)
        assert threshold.value == pytest.approx(2.0)
    threshold.update(4.0)
    assert 2.0 < threshold.value < 4.0


# -- JumpReLU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_jumprelu_dictionary_fires_above_its_thresholds(apply_b_dec_to_input: bool) -> None:
    sae, x = jump(apply_b_dec_to_input=apply_b_dec_to_input), rows()
    pre = (x - sae.b_dec if apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    expected = torch.where((pre > sae.threshold) & (pre > 0), pre, 0.0)
    torch.testing.assert_close(sae.encode(x), expected)
    latents = sae.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(pre).scatter_add(1, latents.indices, latents.values), expected)
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x[7]), sae(x)[7])  # whatever else is in the batch
    few = sae.encode(x, 2)
    assert ((few > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(few[few > 0], expected[few > 0])


def test_blocks_of_unequal_width_lose_no_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = jump(), rows()
    with torch.no_grad():
        sae.encoder_bias[0], sae.threshold[0] = 50.0, 0.0  # latent 0, which padding names, always fires
    whole = sae.encode(x)
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 7 * N)
    latents = sae.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(whole).scatter_add(1, latents.indices, latents.values), whole)
    torch.testing.assert_close(sae.encode(x, N), whole)
    assert (sae.encode(x, 1) > 0).sum() == 60
    assert sae.encode_sparse(x[:0]).values.shape == (0, 1)


def test_a_jumprelu_dictionary_is_differentiable() -> None:
    sae, x = jump().double(), rows().double().requires_grad_()
    (through_sparse,) = torch.autograd.grad(sae(x).square().sum(), x)
    dense = sae.encode(x) @ sae.decoder + sae.decoder_bias
    (through_dense,) = torch.autograd.grad(dense.square().sum(), x)
    torch.testing.assert_close(through_sparse, through_dense)
    assert through_sparse.abs().sum() > 0


def test_a_jumprelu_dictionary_has_a_curve_over_budgets() -> None:
    curve = ev_curve(jump(), rows())
    assert list(curve) == [1, 2, 4, 8, 16, 32, N]
    assert curve[N] == pytest.approx(reconstruction(jump(), rows())["explained_variance"], rel=1e-6)


def test_a_jumprelu_dictionary_is_saved_scaled_and_refused_as_others_are(tmp_path: Path) -> None:
    sae, x = jump(), rows()
    sae.save_pretrained(tmp_path)
    back = TopKSAE.from_pretrained(tmp_path)
    assert isinstance(back, JumpReLUSAE)
    assert torch.equal(back(x), sae(x))
    before = sae.encode(x / 3)
    sae.fold_scales(3.0, 3.0)
    torch.testing.assert_close(sae.encode(x), 3 * before)
    with pytest.raises(TrimtabError, match="k=41 must lie between"):
        sae.encode_sparse(x, 41)


# -- boosted dictionaries --------------------------------------------------------------------------


@pytest.mark.parametrize("base", [topk, jump])
def test_boosted_is_the_base_and_the_sum_of_the_residuals(base: Any) -> None:
    old, one, two, x = base(), residual(5), residual(6, 11), rows()
    boosted = BoostedSAE(old, {"one": one, "two": two})
    expected = old(x) + one.encode(x) @ one.decoder + two.encode(x) @ two.decoder
    torch.testing.assert_close(boosted(x), expected)
    latents = boosted.encode(x)
    assert latents.shape == (60, N + 8 + 11)
    slices = boosted.feature_slices
    assert (slices["base"], slices["one"], slices["two"]) == (slice(0, N), slice(N, N + 8), slice(N + 8, N + 19))
    assert torch.equal(latents[:, slices["base"]], old.encode(x))
    torch.testing.assert_close(boosted.decode(latents), expected)
    sparse = boosted.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(latents).scatter_add(1, sparse.indices, sparse.values), latents)
    torch.testing.assert_close(boosted.decode_sparse(sparse), expected)
    torch.testing.assert_close(BoostedSAE(old, {"two": two, "one": one})(x), expected)


def test_where_no_residual_fires_nothing_changes() -> None:
    old, silent, x = topk(), residual(), rows()
    with torch.no_grad():
        silent.threshold.fill_(torch.inf)
    assert torch.equal(BoostedSAE(old, {"one": silent})(x), old(x))


def test_a_domain_can_be_off() -> None:
    old, one, two, x = topk(), residual(5), residual(6), rows()
    boosted = BoostedSAE(old, {"one": one, "two": two})
    whole = boosted(x)
    boosted.disable("two")
    assert torch.equal(boosted(x), BoostedSAE(old, {"one": one})(x))
    assert not boosted.encode(x)[:, boosted.feature_slices["two"]].any()
    assert boosted.encode(x).shape[1] == N + 16
    with boosted.without("one"):
        assert torch.equal(boosted(x), old(x))
    boosted.enable("two")
    assert torch.equal(boosted(x), whole)
    with pytest.raises(TrimtabError, match="domain='tow'"):
        boosted.disable("tow")


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_stitched_it_is_one_dictionary(tmp_path: Path, apply_b_dec_to_input: bool) -> None:
    old, x = jump(apply_b_dec_to_input=apply_b_dec_to_input), rows()
    boosted = BoostedSAE(old, {"one": residual(5), "two": residual(6, 11)})
    stitched = boosted.stitch()
    torch.testing.assert_close(stitched.encode(x), boosted.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stitched(x), boosted(x), atol=1e-5, rtol=1e-5)
    assert stitched.config.metadata["trimtab"]["stitched"] == {
        "base": [0, N],
        "one": [N, N + 8],
        "two": [N + 8, N + 19],
    }
    stitched.save_pretrained(tmp_path)
    torch.testing.assert_close(TopKSAE.from_pretrained(tmp_path)(x), boosted(x), atol=1e-5, rtol=1e-5)


def test_boosted_is_saved_and_loaded_with_its_order_and_switches(tmp_path: Path) -> None:
    boosted, x = BoostedSAE(topk(), {"zoo": residual(5), "art": residual(6, 11)}), rows()
    boosted.disable("zoo")
    boosted.save_pretrained(tmp_path / "a")
    back = BoostedSAE.from_pretrained(tmp_path / "a")
    assert torch.equal(back(x), boosted(x))
    assert back.feature_slices == boosted.feature_slices
    assert back.enabled == {"zoo": False, "art": True}
    boosted.save_pretrained(tmp_path / "a")
    with pytest.raises(TrimtabError):  # another set of domains does not go where this one is
        BoostedSAE(topk(), {"zoo": residual(5)}).save_pretrained(tmp_path / "a")
    for spoilt in ("{", "[]", '{"domains": {"../x": true}}', '{"domains": {"zoo": 1}}'):
        (tmp_path / "a" / "boosted.json").write_text(spoilt)
        with pytest.raises(TrimtabError, match=r"boosted\.json"):
            BoostedSAE.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parts_of_other_precisions_go_together(dtype: torch.dtype) -> None:
    old, silent, x = jump().to(dtype), residual(), rows().to(dtype)
    boosted = BoostedSAE(old, {"one": residual(5)})
    sparse = boosted.decode_sparse(boosted.encode_sparse(x))
    torch.testing.assert_close(sparse, boosted.decode(boosted.encode(x)), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(boosted(x).to(sparse.dtype), sparse, rtol=2e-2, atol=2e-2)
    with pytest.raises(TrimtabError, match=r"residual 'one' is torch\.float32, the base torch\..*other latents would"):
        boosted.stitch()
    assert BoostedSAE(old, {"one": residual(5).to(dtype)}).stitch().dtype == dtype
    with torch.no_grad():
        silent.threshold.fill_(torch.inf)
    assert torch.equal(BoostedSAE(old, {"one": silent})(x), old(x))


def test_what_cannot_be_boosted_or_stitched_is_refused() -> None:
    with pytest.raises(TrimtabError, match="a TopKSAE, whose selection is among all latents"):
        BoostedSAE(topk(), {"one": residual()}).stitch()
    with pytest.raises(TrimtabError, match="reads and writes"):
        BoostedSAE(topk(), {"one": JumpReLUSAE(JumpReLUSAEConfig(d_in=9, n_latents=8, apply_b_dec_to_input=False))})
    with pytest.raises(TrimtabError, match="has a decoder bias"):
        BoostedSAE(topk(), {"one": jump(apply_b_dec_to_input=False)})
    for name in ("../one", "base", ""):
        with pytest.raises(TrimtabError, match="without dots and slashes"):
            BoostedSAE(topk(), {name: residual()})
    with pytest.raises(TrimtabError, match="is a TopKSAE; accepted: a JumpReLUSAE"):
        _check_residual("one", topk(), topk())


def test_a_residual_of_another_place_or_model_is_refused() -> None:
    def of(model: str, place: str, sha: str | None = None) -> dict[str, Any]:
        ours = {"place": place, "activations": {"model_sha256": sha}}
        return {"model_name": model, "hook_name": f"hook of {place}", "trimtab": ours}

    base = of("google/gemma", "resid.2", "a")
    assert other_origin(of("folder/Gemma", "resid.2"), base) is None
    assert other_origin(of("copy", "resid.2", "a"), base) is None
    assert other_origin({"hook_name": "hook of resid.2", "model_name": "gemma-small/"}, base) is None
    before = {"hook_name": "blocks.8.hook_resid_pre"}
    assert other_origin(before, {"hook_name": "blocks.7.hook_resid_post", "trimtab": {"place": "resid.7"}}) is None
    assert other_origin(before, {"hook_name": "blocks.8.hook_resid_post"}) is not None
    assert other_origin({}, base) is None
    assert other_origin({"hook_name": "hook of resid.2", "model_name": "gemma"}, base) is None
    assert other_origin(of("google/gemma", "resid.7"), base) == ("place 'resid.7'", "place 'resid.2'")
    assert other_origin(of("google/t5", "resid.2", "b"), base) == ("model 'google/t5'", "model 'google/gemma'")
    old, new = jump(), residual()
    old.config.metadata.update(base)
    new.config.metadata.update(of("google/t5", "resid.2", "b"))
    with pytest.raises(TrimtabError, match="residual 'one' is of model 'google/t5', the base of model 'google/gemma'"):
        BoostedSAE(old, {"one": new})


# -- residuals that read the error -----------------------------------------------------------------


def of_error(seed: int = 5, n_latents: int = 8) -> JumpReLUSAE:
    """The same weights as `residual`, given the error instead."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, n_latents=n_latents, apply_b_dec_to_input=False, encoder_input="error"))
    sae.load_state_dict(residual(seed, n_latents).state_dict())
    return sae


@pytest.mark.parametrize("base", [topk, jump])
def test_a_residual_can_read_the_error(base: Any) -> None:
    old, one, two, x = base(), of_error(5), residual(6, 11), rows()
    boosted = BoostedSAE(old, {"one": one, "two": two})
    error = x - old(x)
    expected = old(x) + one.encode(error) @ one.decoder + two.encode(x) @ two.decoder
    torch.testing.assert_close(boosted(x), expected)
    latents, own = boosted.encode(x), boosted.feature_slices["one"]
    torch.testing.assert_close(latents[:, own], one.encode(error))
    reading_x = BoostedSAE(old, {"one": residual(5)}).encode(x)[:, own]
    assert ((latents[:, own] > 0) != (reading_x > 0)).any()
    sparse = boosted.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(latents).scatter_add(1, sparse.indices, sparse.values), latents)
    torch.testing.assert_close(boosted.decode_sparse(sparse), expected)
    boosted.disable("two")
    boosted.disable("one")
    assert torch.equal(boosted(x), old(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_where_no_reader_of_the_error_fires_nothing_changes(dtype: torch.dtype) -> None:
    old, silent, x = jump().to(dtype), of_error(), rows().to(dtype)
    with torch.no_grad():
        silent.threshold.fill_(torch.inf)
    assert torch.equal(BoostedSAE(old, {"one": silent})(x), old(x))


def test_the_error_of_bfloat16_activations_is_not_their_rounding() -> None:
    """A base that is right but for 2^-9 of x: the error is far below what bfloat16 resolves, and is still read."""
    old = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, n_latents=2 * D, apply_b_dec_to_input=False))
    with torch.no_grad():
        old.encoder.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        old.decoder.copy_((1 - 2**-9) * old.encoder)
    x = rows().bfloat16()
    boosted = BoostedSAE(old, {"one": of_error()})
    own = boosted.feature_slices["one"]
    torch.testing.assert_close(boosted.encode(x)[:, own], of_error().encode(x.float() * 2**-9), rtol=1e-3, atol=1e-5)


def test_a_reader_of_the_error_is_saved_as_one_and_is_no_dictionary_of_activations(tmp_path: Path) -> None:
    boosted, x = BoostedSAE(jump(), {"one": of_error(), "two": residual(6)}), rows()
    boosted.save_pretrained(tmp_path / "all")
    back = BoostedSAE.from_pretrained(tmp_path / "all")
    assert back.residuals["one"].config.encoder_input == "error"
    assert torch.equal(back(x), boosted(x))
    assert "error" in (tmp_path / "all" / "residuals" / "one" / "README.md").read_text()
    with pytest.raises(TrimtabError, match="residual 'one' has encoder_input='error'"):
        boosted.stitch()
    boosted.disable("one")
    torch.testing.assert_close(boosted.stitch()(x), boosted(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(TrimtabError, match="exported to SAELens"):
        export_saelens(of_error(), tmp_path / "one")
    with pytest.raises(TrimtabError, match="the base reads the error"):
        BoostedSAE(of_error(), {})
    with pytest.raises(TrimtabError, match="no meaning with transcoder"):
        JumpReLUSAEConfig(d_in=D, n_latents=N, encoder_input="error", transcoder=True, apply_b_dec_to_input=False)


# -- training --------------------------------------------------------------------------------------


def mixed(tokens: int, atoms: slice, seed: int) -> Tensor:
    """Rows that are sums of three of the 30 directions that `atoms` cuts out."""
    directions = torch.nn.functional.normalize(rows(30, 99, 24), dim=-1)[atoms]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, len(directions), generator=generator).topk(3, dim=-1).indices
    weights = torch.zeros(tokens, len(directions)).scatter(-1, chosen, 0.5 + torch.rand(tokens, 3, generator=generator))
    return 20 * (weights @ directions + 0.5)


GENERAL, DOMAIN = slice(0, 20), slice(14, 30)


def settings(**changes: Any) -> TrainingConfig:
    values = {"tokens": 30_000, "batch_size": 100, "learning_rate": 1e-2, "dead_after": 3_000, "checkpoint_every": 100}
    return TrainingConfig(**(values | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    dictionary = DictionaryConfig(place="x", n_latents=48, k=3, sparsifier="batch_topk")
    train([dictionary], TensorShards({"x": mixed(10_000, GENERAL, 0)}), settings(), out)
    return out / "x"


def test_a_batch_topk_dictionary_keeps_its_sparsity_at_inference(base: Path) -> None:
    sae = TopKSAE.from_pretrained(base)
    assert isinstance(sae, JumpReLUSAE)
    found = reconstruction(sae, mixed(2000, GENERAL, 1))
    assert found["explained_variance"] > 0.8
    assert found["l0"] == pytest.approx(3, rel=0.2)


def test_a_residual_adds_the_domain_and_leaves_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    old = TopKSAE.from_pretrained(base)
    before = {name: weight.clone() for name, weight in old.state_dict().items()}
    dictionary = DictionaryConfig(place="x", n_latents=16, k=2, base=str(base))
    general, domain = mixed(10_000, GENERAL, 2), mixed(10_000, DOMAIN, 3)
    source = Mixture(TensorShards({"x": domain}), TensorShards({"x": general}), 0.1)
    new = train([dictionary], source, settings(), tmp_path / "run")["x"]
    assert isinstance(new, JumpReLUSAE)
    assert not new.decoder_bias.any()
    torch.testing.assert_close(new.decoder.norm(dim=-1), torch.ones(16))
    boosted = BoostedSAE(TopKSAE.from_pretrained(base), {"domain": new})
    assert all(torch.equal(weight, before[name]) for name, weight in boosted.base.state_dict().items())
    gains = {}
    for name, atoms in (("general", GENERAL), ("domain", DOMAIN)):
        held_out = mixed(2000, atoms, 4)
        gains[name] = [reconstruction(sae, held_out)["explained_variance"] for sae in (old, boosted)]
    assert gains["domain"][1] > gains["domain"][0] + 0.1
    assert gains["general"][1] > gains["general"][0] - 0.05
    again = train([dictionary], source, settings(), tmp_path / "run")["x"]  # resumed at its end
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), new.parameters(), strict=True))


def test_a_residual_learns_from_the_error_what_it_keeps_from_general_text(base: Path, tmp_path: Path) -> None:
    """Trained without any general text, a reader of the error changes less of it than a reader of x."""
    general, domain = mixed(2000, GENERAL, 4), mixed(2000, DOMAIN, 4)
    old, gains, found = TopKSAE.from_pretrained(base), {}, {}
    for reads in ("input", "error"):
        dictionary = DictionaryConfig(place="x", n_latents=16, k=2, base=str(base), encoder_input=reads)
        new = train([dictionary], TensorShards({"x": mixed(10_000, DOMAIN, 3)}), settings(), tmp_path / reads)["x"]
        assert isinstance(new, JumpReLUSAE)
        assert new.config.encoder_input == reads
        again = TopKSAE.from_pretrained(tmp_path / reads / "x")
        assert again.config.encoder_input == reads  # type: ignore[attr-defined]
        boosted = BoostedSAE(TopKSAE.from_pretrained(base), {"domain": new})
        gains[reads] = [
            reconstruction(boosted, held_out)["explained_variance"]
            - reconstruction(old, held_out)["explained_variance"]
            for held_out in (general, domain)
        ]
        found[reads] = boosted.encode(domain)[:, 48:].gt(0).sum(-1).double().mean().item()
    assert gains["error"][1] > 0.1
    assert gains["error"][0] > gains["input"][0]
    assert found["error"] == pytest.approx(2, rel=0.25)  # the threshold is in the error's own units
    twice = DictionaryConfig(place="x", n_latents=16, k=2, base=str(tmp_path / "error" / "x"))
    with pytest.raises(TrimtabError, match="reads the error of another dictionary"):
        train([twice], TensorShards({"x": domain}), settings(), tmp_path / "twice")


def test_a_perfect_base_leaves_nothing_to_learn(tmp_path: Path) -> None:
    exact = JumpReLUSAE(JumpReLUSAEConfig(d_in=24, n_latents=48))
    with torch.no_grad():
        for weight in (exact.encoder, exact.decoder):
            weight.copy_(torch.cat([torch.eye(24), -torch.eye(24)]))
    exact.save_pretrained(tmp_path / "exact")
    dictionary = DictionaryConfig(place="x", n_latents=8, k=2, base=str(tmp_path / "exact"))
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    residual = train([dictionary], TensorShards({"x": x}), settings(), tmp_path / "run")["x"]
    assert isinstance(residual, JumpReLUSAE)
    assert not residual(x).any()
    assert torch.equal(BoostedSAE(exact, {"nothing": residual})(x), exact(x))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert {entry["dictionaries"]["x"]["loss"] for entry in history} == {0.0}
    of_error = dataclasses.replace(dictionary, encoder_input="error")
    residual = train([of_error], TensorShards({"x": x}), settings(), tmp_path / "error")["x"]
    assert isinstance(residual, JumpReLUSAE)
    assert torch.equal(BoostedSAE(exact, {"nothing": residual})(x), exact(x))


@pytest.mark.parametrize("subtract", [True, False])
def test_a_finished_dictionary_is_where_fine_tuning_starts(tmp_path: Path, subtract: bool) -> None:
    """At the smallest rate its output stays what it was, whatever the norms of its decoder."""
    rows_ = mixed(10_000, GENERAL, 0)
    options = {"apply_b_dec_to_input": subtract}
    first = DictionaryConfig(place="x", n_latents=48, k=3)
    old = train([first], TensorShards({"x": rows_}), settings(**options), tmp_path / "a")["x"]
    with torch.no_grad():
        scale = torch.rand(48, 1, generator=torch.Generator().manual_seed(0)) + 0.5
        spread = TopKSAE(old.config)
        spread.load_state_dict(old.state_dict())
        spread.decoder.mul_(scale)
        spread.encoder.div_(scale)
        spread.encoder_bias.div_(scale[:, 0])
    for name, sae in (("unit", old), ("spread", spread)):
        sae.save_pretrained(tmp_path / name)
        again = DictionaryConfig(place="x", n_latents=48, k=3, start=str(tmp_path / name))
        still = settings(tokens=1_000, learning_rate=1e-12, final_learning_rate=0.0, alpha=0.0, **options)
        tuned = train([again], TensorShards({"x": rows_}), still, tmp_path / f"tuned-{name}")["x"]
        torch.testing.assert_close(tuned(rows_[:200]), old(rows_[:200]), atol=2e-2, rtol=1e-3)


def test_what_cannot_be_a_start_is_refused(base: Path, tmp_path: Path) -> None:
    shards = TensorShards({"x": mixed(1000, GENERAL, 0)})
    for options, message in (
        ({"n_latents": 16}, "n_latents=48, this dictionary 16"),
        ({"kron": (2, 4)}, "base or kron"),
    ):
        fields: dict[str, Any] = {"place": "x", "n_latents": 48, "k": 2, "start": str(base)} | options
        with pytest.raises(TrimtabError, match=message):
            train([DictionaryConfig(**fields)], shards, settings(), tmp_path / "run")


def test_a_residual_is_learned_in_the_middle_of_a_run_as_in_one_go(base: Path, tmp_path: Path) -> None:
    dictionary = DictionaryConfig(place="x", n_latents=16, k=2, base=str(base))

    def source() -> Mixture:
        parts = [TensorShards({"x": mixed(3_000, atoms, 3)}, shard_rows=1_000) for atoms in (DOMAIN, GENERAL)]
        return Mixture(parts[0], parts[1], 0.2)

    stops = settings(tokens=10_000, checkpoint_every=30, keep_last=9)
    whole = train([dictionary], source(), stops, tmp_path / "whole")["x"]
    copied = tmp_path / "part" / "checkpoints" / "step-00000060"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / copied.name, copied)
    resumed = train([dictionary], source(), stops, tmp_path / "part")["x"]
    assert isinstance(resumed, JumpReLUSAE)
    assert resumed.threshold[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    held_out = torch.cat([mixed(1600, DOMAIN, 4), mixed(400, GENERAL, 4)])
    assert reconstruction(whole, held_out)["l0"] == pytest.approx(2, rel=0.2)  # scaled in and out, the threshold too


def test_a_planted_error_is_found(tmp_path: Path) -> None:
    """The base misses one direction that x shows plainly: the residual's strongest row is that direction."""
    planted = torch.nn.functional.normalize(rows(1, 5, 24)[0], dim=0)
    generator = torch.Generator().manual_seed(1)
    strength = torch.rand(10_000, 1, generator=generator) * (torch.rand(10_000, 1, generator=generator) < 0.3)
    x = torch.randn(10_000, 24, generator=generator)
    x = x - (x @ planted)[:, None] * planted + 8 * strength * planted
    base = JumpReLUSAE(JumpReLUSAEConfig(d_in=24, n_latents=48, apply_b_dec_to_input=False))
    blind = torch.linalg.qr(torch.cat([planted[:, None], rows(24, 8, 24)], 1)).Q[:, 1:].T
    with torch.no_grad():
        both = torch.cat([blind, -blind, torch.zeros(2, 24)])
        base.encoder.copy_(both)
        base.decoder.copy_(both)
    base.save_pretrained(tmp_path / "base")
    dictionary = DictionaryConfig(place="x", n_latents=4, k=1, base=str(tmp_path / "base"))
    new = train([dictionary], TensorShards({"x": x}), settings(learning_rate=3e-2), tmp_path / "run")["x"]
    used = new.encode(x).sum(0).argmax()
    assert (new.decoder[used] @ planted).abs() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kron": (2, 4), "sparsifier": "batch_topk"}, "batch_topk"),
        ({"objective": "hierarchical", "sparsifier": "batch_topk"}, "batch_topk"),
        ({"base": "b", "target": "y"}, "dense autoencoders only"),
        ({"encoder_input": "error"}, "needs base"),
        ({"k": 17}, "k=17"),
        ({"k": 0}, "k=0"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        DictionaryConfig(**({"place": "x", "n_latents": 16, "k": 2} | options))


def test_a_base_of_another_place_or_width_is_refused(base: Path, tmp_path: Path) -> None:
    shards = TensorShards({"y": mixed(1000, GENERAL, 0), "x": rows(1000)})
    for place, message in (("y", "reads place 'x'"), ("x", "features; this dictionary reads d_in=24")):
        dictionary = DictionaryConfig(place=place, n_latents=16, k=2, base=str(base))
        with pytest.raises(TrimtabError, match=message):
            train([dictionary], shards, settings(), tmp_path / place)


# -- mixtures --------------------------------------------------------------------------------------


def test_a_mixture_has_the_share_that_was_asked_for() -> None:
    main = TensorShards({"x": torch.zeros(900, 2)}, shard_rows=90)
    other = TensorShards({"x": torch.arange(1.0, 901.0)[:, None].expand(-1, 2).contiguous()}, shard_rows=90)
    mixture = Mixture(main, other, 0.1)
    drawn = []
    for index in range(18):
        shard = mixture.shard(index)["x"][:, 0]
        assert len(shard) == 100
        drawn += shard[shard > 0].tolist()
    assert sorted(drawn) == list(range(1, 181))  # every row of the other's first two shards, once
    assert torch.equal(mixture.shard(5)["x"], Mixture(main, other, 0.1).shard(5)["x"])
    assert mixture.identity["mixed"][0]["share"] == 0.1
    twice = Mixture(mixture, main, 0.1).identity["mixed"]
    assert [part["with"] for part in twice] == [other.identity, main.identity]
    mixture.restore(mixture.state(3))


def test_a_short_source_comes_round_again() -> None:
    main, other = TensorShards({"x": torch.zeros(900, 2)}), TensorShards({"x": torch.ones(10, 2)})
    assert Mixture(main, other, 0.5).shard(0)["x"].sum() == 1800


def test_what_cannot_be_mixed_is_refused() -> None:
    main = TensorShards({"x": torch.rand(900, 2)})
    with pytest.raises(TrimtabError, match=r"share=1\.0"):
        Mixture(main, main, 1.0)
    with pytest.raises(TrimtabError, match="of the two sources differ"):
        Mixture(main, TensorShards({"y": torch.rand(900, 2)}), 0.5)


# -- the report ------------------------------------------------------------------------------------


def test_a_report_says_what_a_domain_gains_and_general_text_loses(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    def harvest(words: range) -> Harvest:
        documents = [" ".join(f"w{words[(7 * i + j * j) % len(words)]}" for j in range(9)) for i in range(30)]
        config = HarvestConfig(context=12, sequences_per_forward=4, sink_norm_ratio=None)
        return Harvest(tiny_llama, tiny_tokenizer, TextSource(documents), ["resid.1"], config)

    general, domain = harvest(range(30)), harvest(range(25, 60))
    old = randomised(TopKSAE(TopKSAEConfig(d_in=32, n_latents=40, k=4)))
    new = randomised(JumpReLUSAE(JumpReLUSAEConfig(d_in=32, n_latents=6, apply_b_dec_to_input=False)), 5)
    off = randomised(JumpReLUSAE(JumpReLUSAEConfig(d_in=32, n_latents=5, apply_b_dec_to_input=False)), 6)
    with torch.no_grad():
        for weight in (old.encoder, old.decoder, old.decoder_bias, new.decoder):
            weight.mul_(0.02)
        new.threshold.zero_()
        new.decoder_bias.zero_()
        off.decoder_bias.zero_()
        new.decoder[0] = 3 * old.decoder[7]
    boosted = BoostedSAE(old, {"one": new, "two": off})
    boosted.disable("two")
    report = boost_report(boosted, general=general, domain=domain, place="resid.1", tokens=200, ce_tokens=50)
    assert report.boosted_general.ce_clean == report.base_general.ce_clean
    states = torch.cat([f.activations["resid.1"][f.keep] for f in general.forwards(sequences=17)])
    fires = new.encode(states) > 0
    assert report.new_l0[0] == pytest.approx(fires.double().sum(1).mean().item(), abs=1e-4)
    assert report.firing_on_general == pytest.approx(fires.any(0).double().mean().item())
    assert report.largest_cosine.shape == (6,)
    assert report.largest_cosine[0] == pytest.approx(1.0, abs=1e-5)
    assert report.largest_cosine[1:].max() < 0.99
    summary = report.summary()
    difference = report.boosted_domain.explained_variance - report.base_domain.explained_variance
    if report.base_domain.explained_variance > 0:
        assert summary["gain"] == pytest.approx(difference / report.base_domain.explained_variance)
    else:
        assert math.isnan(summary["gain"])
    boosted.disable("one")
    with pytest.raises(TrimtabError, match="are all off"):
        boost_report(boosted, general=general, domain=domain, place="resid.1")
    assert any("new latents fire" in warning for warning in report.warnings) == (report.new_l0[0] > 0.5)


def test_a_report_warns_of_forgetting_and_of_nothing_else() -> None:
    def evaluation(value: float) -> Evaluation:
        names = [name for name in Evaluation.__dataclass_fields__ if name != "densities"]
        fields: dict[str, Any] = dict.fromkeys(names, 0.5) | {"tokens": 1, "ce_tokens": 1, "explained_variance": value}
        return Evaluation(**fields, densities=torch.zeros(3))

    def report(general: float, l0: float) -> BoostReport:
        return BoostReport(
            base_general=evaluation(0.8),
            base_domain=evaluation(0.5),
            boosted_general=evaluation(general),
            boosted_domain=evaluation(0.75),
            new_l0=(l0, 2.0),
            firing_on_general=0.1,
            largest_cosine=torch.tensor([0.3]),
        )

    assert report(0.799, 0.1).warnings == []
    assert report(0.799, 0.1).gain == pytest.approx(0.5)
    (forgetting,) = report(0.7, 0.1).warnings
    assert "-12.5%" in forgetting
    (busy,) = report(0.81, 0.7).warnings
    assert "0.70 new latents" in busy
