"""The object for SAEBench: what SAEBench checks of a custom SAE, and that it is the same dictionary."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig
from trimtab.sae.saebench import SAEBenchSAE

D, F = 10, 48


def dictionary(kind: str, **options: Any) -> TopKSAE:
    sae: TopKSAE
    if kind == "kron":
        sae = KronSAE(KronSAEConfig(d_in=D, h=6, m=2, n=4, k=5, **options))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, n_latents=F, **options))
    else:
        sae = TopKSAE(TopKSAEConfig(d_in=D, n_latents=F, k=5, **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return sae


def wrapped(sae: TopKSAE) -> SAEBenchSAE:
    return SAEBenchSAE(sae, model_name="pythia-70m-deduped", hook_layer=3)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(2))


KINDS = ("topk", "jumprelu", "kron")


# -- SAEBench's own checks ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_norms_and_both_ways_to_the_reconstruction(kind: str, dtype: torch.dtype) -> None:
    sae = wrapped(dictionary(kind)).to(device=torch.device("cpu"), dtype=dtype)
    assert (sae.device, sae.dtype, sae.W_enc.dtype) == (torch.device("cpu"), dtype, dtype)
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_in) == (F, D)
    assert sae.W_enc.shape == (D, F)
    assert (sae.b_enc.shape, sae.b_dec.shape) == ((F,), (D,))
    norms = torch.norm(sae.W_dec.data, dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    x = activations(3, 7).to(dtype)
    latents = sae.encode(x)
    assert (latents.shape, latents.dtype) == ((3, 7, F), dtype)
    assert torch.allclose(sae(x.flatten(0, 1)).reshape(x.shape), sae.decode(latents))


def test_the_configuration_is_what_evaluations_read() -> None:
    sae = dictionary("kron", metadata={"context_size": 256})
    cfg = SAEBenchSAE(sae, model_name="gemma-3-270m", hook_layer=9).cfg
    assert (cfg.model_name, cfg.hook_layer, cfg.hook_name) == ("gemma-3-270m", 9, "blocks.9.hook_resid_post")
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.architecture, cfg.context_size) == (D, F, "float32", "kron_topk", 256)
    assert cfg.apply_b_dec_to_input is False
    cfg.metadata = object()  # SAEBench adds what cannot be serialised
    json.dumps(cfg.to_dict())
    assert cfg.to_dict() == asdict(cfg)
    named = SAEBenchSAE(sae, model_name="m", hook_layer=9, hook_name="blocks.9.hook_mlp_out")
    assert named.cfg.hook_name == "blocks.9.hook_mlp_out"


# -- the same dictionary -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_rescaled_and_reconstructions_are_not(kind: str) -> None:
    sae = dictionary(kind).double()
    bench, x = wrapped(sae), activations(40).double()
    torch.testing.assert_close(bench(x), sae(x))
    torch.testing.assert_close(bench.decode(bench.encode(x)), sae.decode(sae.encode(x)))
    torch.testing.assert_close(bench.encode(x), sae.encode(x) * sae.decoder.norm(dim=-1))
    rows = sae.decoder / sae.decoder.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(bench.W_dec, rows)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_latents_that_fire_are_those_of_the_encoder_matrix(kind: str, subtract: bool) -> None:
    bench, x = wrapped(dictionary(kind, apply_b_dec_to_input=subtract)), activations(40)
    pre = (x - bench.b_dec * subtract) @ bench.W_enc + bench.b_enc
    latents = bench.encode(x)
    assert (latents > 0).any()
    torch.testing.assert_close(latents, pre.where(latents > 0, 0.0))


def test_the_stand_in_for_a_kron_encoder_is_the_sum_of_both_rows() -> None:
    sae = dictionary("kron")
    bench = wrapped(sae)
    listing = sae.W_enc.T.unflatten(0, (6, 2 + 4)), sae.b_enc.unflatten(0, (6, 2 + 4))
    for head, i, j in ((0, 0, 0), (3, 1, 2), (5, 1, 3)):
        row, bias = (part[head, i] + part[head, 2 + j] for part in listing)
        latent = head * 8 + i * 4 + j
        torch.testing.assert_close(bench.W_enc[:, latent], row / row.norm())
        torch.testing.assert_close(bench.b_enc[latent], bias / row.norm())


def test_the_dictionary_that_was_given_stays_as_it_is() -> None:
    sae = dictionary("topk")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    bench = wrapped(sae).to(dtype=torch.bfloat16)
    bench.sae.encoder.zero_()
    assert sae.dtype == torch.float32
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    assert all(p.requires_grad for p in sae.parameters())
    assert not any(p.requires_grad for p in bench.parameters())


def test_a_decoder_row_of_zeros_gets_a_direction_and_no_latent() -> None:
    sae, x = dictionary("topk"), activations(40)
    with torch.no_grad():
        sae.decoder[7] = 0
        sae.encoder_bias[7] = 100
    bench = wrapped(sae)
    assert bench.W_dec[7].norm() == 1
    assert (sae.encode(x)[:, 7] > 0).all()
    assert (bench.encode(x)[:, 7] == 0).all()
    torch.testing.assert_close(bench(x), sae(x))


def test_what_saebench_cannot_evaluate_is_refused() -> None:
    transcoder = dictionary("topk", transcoder=True, apply_b_dec_to_input=False)
    with pytest.raises(TrimtabError, match="sae is a transcoder"):
        wrapped(transcoder)
    sae = dictionary("topk")
    with pytest.raises(TrimtabError, match="hook_layer=-1 must be 0 or above"):
        SAEBenchSAE(sae, model_name="m", hook_layer=-1)
    with pytest.raises(TrimtabError, match=r"hook_name='blocks\.3\.attn\.hook_z' is split into heads"):
        SAEBenchSAE(sae, model_name="m", hook_layer=3, hook_name="blocks.3.attn.hook_z")
