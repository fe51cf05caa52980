"""Pre-latents of a KronSAE against its own latents, their statistics and the heads' correlations by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae import explain
from trimtab.sae.encodings import Latents
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.kron import KronSAE, KronSAEConfig, latents_dense
from trimtab.sae.kron_latents import head_correlation, kron_statistics, pre_latent_dictionary, pre_latents
from trimtab.sae.latent_statistics import latent_statistics

H, M, N = 3, 2, 4


def kron(d: int = 6, k: int = 5, seed: int = 0, **options: Any) -> KronSAE:
    sae = KronSAE(KronSAEConfig(**{"d_in": d, "h": H, "m": M, "n": N, "k": k, "eps": 0.0, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae.double()


def inputs(tokens: int = 40, d: int = 6) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# -- pre-latents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("subtract", [False, True])
def test_latents_are_the_roots_of_the_products_of_pre_latents(subtract: bool) -> None:
    sae, x = kron(apply_b_dec_to_input=subtract), inputs()
    base, extension = pre_latents(sae, x)
    assert (base.shape, extension.shape) == ((40, H * M), (40, H * N))
    z = (base.view(40, H, M, 1) * extension.view(40, H, 1, N)).sqrt().flatten(1)
    read = x - sae.decoder_bias if subtract else x
    torch.testing.assert_close(z, latents_dense(read, sae.encoder, sae.encoder_bias, sae.config.encoding))


def test_a_batch_of_sequences_keeps_its_shape_and_gradients_reach_the_encoder() -> None:
    sae, x = kron(), inputs().view(4, 10, 6)
    found = pre_latents(sae, x)
    assert found.base.shape == (4, 10, H * M)
    torch.testing.assert_close(found.extension.flatten(0, 1), pre_latents(sae, inputs()).extension)
    (found.base.sum() + found.extension.sum()).backward()
    assert sae.encoder.grad is not None
    assert (sae.encoder.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("subtract", [False, True])
def test_the_dictionary_of_pre_latents_encodes_them(subtract: bool) -> None:
    sae, x = kron(apply_b_dec_to_input=subtract), inputs()
    pre = pre_latent_dictionary(sae)
    assert pre.config.n_latents == H * (M + N)
    expected = torch.cat(pre_latents(sae, x), -1)
    torch.testing.assert_close(pre.encode(x), expected)
    values, indices = pre.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(expected).scatter_add(1, indices, values), expected)


def test_a_pre_latent_writes_the_mean_of_what_its_latents_write() -> None:
    sae = kron()
    pre = pre_latent_dictionary(sae)
    for head, i in itertools.product(range(H), range(M)):
        rows = [head * M * N + i * N + j for j in range(N)]
        torch.testing.assert_close(pre.decoder[head * M + i], sae.decoder[rows].mean(0))
    for head, j in itertools.product(range(H), range(N)):
        rows = [head * M * N + i * N + j for i in range(M)]
        torch.testing.assert_close(pre.decoder[H * M + head * N + j], sae.decoder[rows].mean(0))
    with torch.no_grad():
        pre.encoder.zero_()
    assert sae.encoder.abs().min() > 0  # copies


def test_a_transcoder_has_pre_latents() -> None:
    sae = kron(transcoder=True, d_out=9)
    assert pre_latent_dictionary(sae).decoder.shape == (H * (M + N), 9)


def test_the_raw_product_has_no_pre_latents() -> None:
    for function in (lambda sae: pre_latents(sae, inputs()), pre_latent_dictionary):
        with pytest.raises(TrimtabError, match="activation='product'"):
            function(kron(activation="product"))


# -- statistics ------------------------------------------------------------------------------------


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Harvest:
    g = torch.Generator().manual_seed(5)
    text = [" ".join(f"w{i}" for i in torch.randint(0, 60, (9,), generator=g).tolist()) for _ in range(12)]
    config = HarvestConfig(context=16, sequences_per_forward=3, sink_norm_ratio=None)
    return Harvest(tiny_llama, tiny_tokenizer, TextSource(text), ["resid.1"], config)


@pytest.fixture
def sae() -> KronSAE:
    sae = kron(d=32).float()
    with torch.no_grad():
        sae.encoder.mul_(20)
        sae.encoder_bias[0] = -1e6  # the first base component of head 0
    return sae


def test_statistics_are_those_of_every_activation(harvest: Harvest, sae: KronSAE) -> None:
    found = kron_statistics(sae, harvest, place="resid.1")
    forwards = list(harvest.forwards())
    ids = torch.cat([f.input_ids[f.keep] for f in forwards])
    states = torch.cat([f.activations["resid.1"][f.keep] for f in forwards])
    kinds = (*pre_latents(sae, states), sae.encode(states))
    for statistics, latents in zip(found, kinds, strict=True):
        latents = latents.detach().double()
        fires = latents > 0
        torch.testing.assert_close(statistics.density, fires.double().mean(0).float())
        mass = torch.zeros(64, latents.shape[1], dtype=torch.float64).index_add_(0, ids, latents)
        shares = mass / mass.sum(0)
        entropy = -torch.special.xlogy(shares, shares).sum(0).float()
        torch.testing.assert_close(statistics.token_entropy, entropy, equal_nan=True, atol=1e-5, rtol=1e-5)
        assert statistics.dead_fraction == pytest.approx(1 - fires.any(0).double().mean().item())
    assert found.base.density[0] == 0
    assert torch.isnan(found.base.multitoken_ratio[0])
    assert found.post.dead_fraction >= 1 / (H * M)
    summary = found.base.summary()
    assert summary["dead_fraction"] == pytest.approx(1 / (H * M))
    assert summary["token_entropy"] == pytest.approx(found.base.token_entropy[1:].mean().item())


def test_statistics_agree_with_explanations(harvest: Harvest, sae: KronSAE) -> None:
    pre = pre_latent_dictionary(sae)
    statistics = latent_statistics(pre, harvest, place="resid.1", contexts=3, before=2, after=2)
    explanations, densities = explain(pre, harvest, place="resid.1", contexts=3, before=2, after=2)
    torch.testing.assert_close(statistics.density, densities)
    assert len(explanations) == H * (M + N) - 1
    for e in explanations:
        assert statistics.token_entropy[e.latent].item() == pytest.approx(e.token_entropy)
        assert statistics.multitoken_ratio[e.latent].item() == pytest.approx(e.multitoken_ratio)


def test_contexts_below_one_are_refused(harvest: Harvest, sae: KronSAE) -> None:
    with pytest.raises(TrimtabError, match="contexts=0 must be at least 1"):
        latent_statistics(sae, harvest, place="resid.1", contexts=0)


# -- heads -----------------------------------------------------------------------------------------


def by_hand(latents: Tensor, heads: int) -> tuple[float, float]:
    """Means of the entries of the correlation matrix off its diagonal, inside blocks and outside."""
    per_head = latents.shape[1] // heads
    varies = latents.std(0) > 0
    matrix = torch.corrcoef(latents[:, varies].T)
    head = (torch.arange(latents.shape[1]) // per_head)[varies]
    same = head[:, None] == head
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    return matrix[same & off].mean().item(), matrix[~same].mean().item()


def test_correlations_of_heads_are_the_blocks_of_the_correlation_matrix() -> None:
    sae, x = kron(), inputs(200)
    with torch.no_grad():
        sae.encoder_bias[0] = -1e6  # dead latents take no part
    found = head_correlation(sae, x)
    assert tuple(found) == pytest.approx(by_hand(sae.encode(x).detach(), H))


def test_latents_that_fire_together_in_their_head_correlate_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = kron()
    g = torch.Generator().manual_seed(3)
    head = torch.randint(0, H, (300, 1), generator=g)
    indices = head * M * N + torch.arange(M * N)  # all latents of one head fire, with one value
    monkeypatch.setattr(sae, "encode_sparse", lambda x: Latents(torch.ones(indices.shape), indices))
    found = head_correlation(sae, inputs(300))
    assert found.within == pytest.approx(1)
    assert found.across < -0.2


def test_pairs_that_do_not_exist_have_no_correlation() -> None:
    one = head_correlation(kron(h=1), inputs())
    assert one.across != one.across
    assert one.within == one.within
    with pytest.raises(TrimtabError, match="x has 1 tokens"):
        head_correlation(kron(), inputs(1))
