"""KronSAE's encoding: the oracles of arXiv 2505.22255 on plain tensors."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import functional as fn
from trimtab.sae import kernels
from trimtab.sae.formats import write_sparsify
from trimtab.sae.functional import Weights, loss_and_gradients
from trimtab.sae.kron import (
    KronEncoding,
    KronSAE,
    KronSAEConfig,
    flops_kron,
    flops_topk,
    head_major,
    initial_weights,
    latents_dense,
)
from trimtab.sae.modeling import TopKSAE
from trimtab.sae.objectives import RECONSTRUCTION, Hierarchical, Matryoshka, MultiTopK

D = 6


def encoding(h: int = 3, m: int = 2, n: int = 4, **options: Any) -> KronEncoding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of shapes that save nothing, which tests use
        return KronEncoding(h=h, m=m, n=n, **options)


def weights(shape: KronEncoding, seed: int = 0, d: int = D) -> Weights:
    g = torch.Generator().manual_seed(seed)
    sizes = ((shape.rows, d), (shape.rows,), (shape.n_latents, d), (d,))
    return Weights(*(torch.randn(size, generator=g, dtype=torch.float64) for size in sizes))


def inputs(tokens: int = 9, seed: int = 7, d: int = D) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(latents: fn.Latents, n_latents: int) -> Tensor:
    return torch.zeros(len(latents.values), n_latents, dtype=latents.values.dtype).scatter(
        1, latents.indices, latents.values
    )


def pre_latents(x: Tensor, w: Weights, shape: KronEncoding) -> tuple[Tensor, Tensor]:
    """u [tokens, h, m] and v [tokens, h, n], by the listing's layout."""
    pre = (x @ head_major(w.encoder, shape).T + head_major(w.encoder_bias, shape)).unflatten(1, (shape.h, -1))
    return pre[..., : shape.m], pre[..., shape.m :]


# -- what the latents are --------------------------------------------------------------------------


def test_latents_are_the_root_of_the_kronecker_product_of_each_head() -> None:
    shape = encoding(eps=0.0)
    x, w = inputs(), weights(shape)
    u, v = pre_latents(x, w, shape)
    expected = torch.stack(
        [torch.cat([torch.kron(u[t, k].relu(), v[t, k].relu()).sqrt() for k in range(shape.h)]) for t in range(len(x))]
    )
    torch.testing.assert_close(latents_dense(x, w.encoder, w.encoder_bias, shape), expected)


def test_the_flat_index_counts_heads_then_bases_then_extensions() -> None:
    shape = encoding(eps=0.0)
    x, w = inputs(), weights(shape)
    u, v = pre_latents(x, w, shape)
    z = latents_dense(x, w.encoder, w.encoder_bias, shape)
    for k, i, j in itertools.product(range(3), range(2), range(4)):
        expected = (u[:, k, i].relu() * v[:, k, j].relu()).sqrt()
        torch.testing.assert_close(z[:, k * 8 + i * 4 + j], expected)


def test_a_latent_is_on_if_and_only_if_both_of_its_parts_are() -> None:
    shape = encoding()
    x, w = inputs(200), weights(shape)
    u, v = pre_latents(x, w, shape)
    both = ((u > 0)[..., :, None] & (v > 0)[..., None, :]).flatten(1)
    neither = ((u < 0)[..., :, None] & (v < 0)[..., None, :]).flatten(1)
    z = latents_dense(x, w.encoder, w.encoder_bias, shape)
    assert torch.equal(z > 0, both)
    assert neither.any()
    assert not z[neither].any()


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_latents_grow_with_the_encoder(scale: float) -> None:
    shape = encoding(eps=0.0)
    x, w = inputs(), weights(shape)
    z = latents_dense(x, w.encoder, w.encoder_bias, shape)
    torch.testing.assert_close(latents_dense(x, scale * w.encoder, scale * w.encoder_bias, shape), scale * z)


def test_base_and_extension_may_change_places() -> None:
    shape, turned = encoding(3, 2, 4), encoding(3, 4, 2)
    x, w = inputs(), weights(shape)

    def swap(rows: Tensor) -> Tensor:
        return torch.cat([rows[2 * 3 :], rows[: 2 * 3]])

    z = latents_dense(x, w.encoder, w.encoder_bias, shape).unflatten(1, (3, 2, 4))
    other = latents_dense(x, swap(w.encoder), swap(w.encoder_bias), turned).unflatten(1, (3, 4, 2))
    torch.testing.assert_close(other, z.transpose(2, 3))


def test_a_tied_head_of_one_by_one_is_a_topk_latent() -> None:
    shape = encoding(5, 1, 1, eps=0.0)
    x, w = inputs(), weights(shape)
    tied, bias = torch.cat([w.encoder[:5]] * 2), torch.cat([w.encoder_bias[:5]] * 2)
    torch.testing.assert_close(latents_dense(x, tied, bias, shape), (x @ w.encoder[:5].T + w.encoder_bias[:5]).relu())
    found, _ = shape.top(x, tied, bias, 2)
    torch.testing.assert_close(dense(found, 5), fn.encode_dense(x, w.encoder[:5], w.encoder_bias[:5], 2))


def test_the_soft_and_lies_between_its_parts_and_below_their_mean() -> None:
    shape = encoding(eps=0.0)
    p, q = torch.rand(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = shape.values(p, q)
    assert (torch.minimum(p, q) <= z + 1e-12).all()
    assert (z <= torch.maximum(p, q) + 1e-12).all()
    assert (z <= (p + q) / 2 + 1e-12).all()
    torch.testing.assert_close(shape.values(p, p), p)
    torch.testing.assert_close(shape.values(-p, -p), torch.zeros_like(p))


def test_the_listing_keeps_silent_latents_at_the_root_of_eps() -> None:
    listing = encoding(mask_inactive=False)
    u, v = torch.tensor([-1.0, 2.0, 2.0]), torch.tensor([-1.0, -3.0, 2.0])
    torch.testing.assert_close(listing.values(u, v), torch.tensor([1e-5, 1e-5, 4 + 1e-5]).sqrt())
    torch.testing.assert_close(encoding().values(u, v), torch.tensor([0.0, 0.0, (4 + 1e-5) ** 0.5]))


def test_tiny_parts_give_no_not_a_number() -> None:
    tiny = torch.tensor([1e-30, 0.0, -0.0, 1.0])
    for shape in (encoding(), encoding(eps=0.0), encoding(mask_inactive=False)):
        z = shape.values(tiny, tiny)
        assert torch.isfinite(z).all()
        assert all(torch.isfinite(slope).all() for slope in shape.slopes(tiny, tiny, z))


def test_lower_precision_is_multiplied_in_float32() -> None:
    large = torch.tensor([300.0], dtype=torch.float16)
    assert encoding(eps=0.0).values(large, large).item() == 300.0


# -- two-stage TopK --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["mand", "relu_product", "product"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 24])
@pytest.mark.parametrize(("h", "m", "n"), [(3, 2, 4), (8, 1, 3), (2, 4, 3), (1, 4, 6), (24, 1, 1)])
def test_two_stages_find_what_topk_of_all_latents_finds(h: int, m: int, n: int, k: int, activation: str) -> None:
    shape = encoding(h, m, n, activation=activation)
    x, w = inputs(40), weights(shape)
    found, _ = shape.top(x, w.encoder, w.encoder_bias, k)
    z = latents_dense(x, w.encoder, w.encoder_bias, shape)
    best = z.topk(k, dim=-1)
    torch.testing.assert_close(found.values.sort(descending=True).values, best.values.relu())
    expected = torch.zeros_like(z).scatter(1, best.indices, best.values.relu())
    torch.testing.assert_close(dense(found, shape.n_latents), expected)
    assert all(len(row.unique()) == k for row in found.indices)


def test_blocks_of_tokens_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = encoding()
    x, w = inputs(40), weights(shape)
    whole, _ = shape.top(x, w.encoder, w.encoder_bias, 3)
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 50)
    parts, _ = shape.top(x, w.encoder, w.encoder_bias, 3)
    torch.testing.assert_close(dense(parts, 24), dense(whole, 24))


def test_a_token_without_latents_has_zeros_and_no_gradient() -> None:
    shape = encoding()
    w = weights(shape)
    silent = w.encoder_bias - 100
    found, pullback = shape.top(inputs(), w.encoder, silent, 4)
    assert not found.values.any()
    assert not pullback(torch.ones_like(found.values))[0].any()


def test_among_chooses_from_the_given_latents() -> None:
    shape, among = encoding(), torch.tensor([1, 5, 6, 20])
    x, w = inputs(), weights(shape)
    found, _ = shape.top(x, w.encoder, w.encoder_bias, 2, among=among)
    z = latents_dense(x, w.encoder, w.encoder_bias, shape)
    torch.testing.assert_close(found.values.sort(descending=True).values, z[:, among].topk(2).values.relu())
    assert torch.isin(found.indices, among).all()


def test_screening_finds_the_same_latents_nearly_always() -> None:
    shape = encoding(64, 4, 4)
    w = Weights(*(t.float() for t in weights(shape, d=32)))
    x = inputs(64, d=32).float()
    exact, screened = (shape.top(x, w.encoder, w.encoder_bias, 16, precision=p)[0] for p in ("float32", "screened"))
    same = (dense(exact, 1024) - dense(screened, 1024)).abs() < 1e-5
    assert same.float().mean() > 0.999
    low, _ = shape.top(x, w.encoder, w.encoder_bias, 16, precision="bfloat16")
    assert (low.values.sum() / exact.values.sum() - 1).abs() < 1e-2


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["mand", "relu_product", "product"])
@pytest.mark.parametrize("mask_inactive", [True, False])
def test_gradcheck_of_the_encoding(activation: str, mask_inactive: bool) -> None:
    shape = encoding(activation=activation, mask_inactive=mask_inactive, eps=1e-3)
    w = weights(shape)
    leaves = [t.clone().requires_grad_() for t in (inputs(3), w.encoder, w.encoder_bias)]

    def values(x: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
        latents = fn.sparse_encode(x, encoder, bias, 4, encoding=shape)
        return dense(latents, shape.n_latents)

    assert torch.autograd.gradcheck(values, leaves)


def test_gradients_are_finite_at_zero() -> None:
    shape = encoding()
    w = weights(shape)
    leaf = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    fn.sparse_encode(leaf, w.encoder, torch.zeros_like(w.encoder_bias), 4, encoding=shape).values.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


OBJECTIVES = {
    "reconstruction": RECONSTRUCTION,
    "hierarchical": Hierarchical(),
    "budgets": Hierarchical((1, 3), (1.0, 2.0)),
    "multi_topk": MultiTopK(),
    "matryoshka": Matryoshka((8, 16, 24)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("subtract_bias", [True, False])
@pytest.mark.parametrize("kron", [True, False])
def test_the_closed_form_has_the_gradients_of_the_dense_specification(
    kron: bool, subtract_bias: bool, objective: str
) -> None:
    """AuxK included, through all latents and autograd, for both encodings and every objective."""
    shape = encoding()
    k, variance, alpha, k_aux, dead = 4, 5.0, 0.3, 2, torch.tensor([0, 3, 7, 11, 12, 20])
    x, w = inputs(), weights(shape)
    if not kron:
        w = w._replace(encoder=torch.randn(24, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        w = w._replace(encoder_bias=w.encoder[:, 0].clone())
    gradients = Weights(*(torch.full_like(t, torch.nan) for t in w))
    options = {"encoding": shape} if kron else {}
    chosen: Any = OBJECTIVES[objective]
    found = loss_and_gradients(
        x,
        x,
        w,
        gradients,
        k=k,
        variance=variance,
        objective=chosen,
        subtract_bias=subtract_bias,
        dead=dead,
        k_aux=k_aux,
        alpha=alpha,
        **options,
    )

    leaves = Weights(*(t.clone().requires_grad_() for t in w))
    centred = x - leaves.decoder_bias if subtract_bias else x
    z = latents_dense(centred, leaves.encoder, leaves.encoder_bias, shape) if kron else centred @ leaves.encoder.T
    z = z if kron else z + leaves.encoder_bias
    top = z.topk(chosen.selected(k), dim=-1)
    values = top.values.relu()
    if objective == "matryoshka":
        kept = torch.zeros_like(z).scatter(1, top.indices, values)
        parts = [kept[:, :q] @ leaves.decoder[:q] for q in (8, 16, 24)]
        prefixes, shares = torch.stack(parts, 1), torch.full((3,), 1 / 3, dtype=torch.float64)
    else:
        prefixes = (values[..., None] * leaves.decoder[top.indices]).cumsum(1)
        shares = {
            "reconstruction": torch.tensor([0, 0, 0, 1.0]),
            "hierarchical": torch.full((4,), 0.25),
            "budgets": torch.tensor([1, 0, 2, 0]).double() / 3,
            "multi_topk": torch.tensor([0, 0, 0, 1.0] + [0] * 11 + [1 / 8]),
        }[objective].double()
    errors = x[:, None] - (prefixes + leaves.decoder_bias)
    main = (shares * errors.square().sum(-1)).sum(1).mean() / variance
    aux = fn.aux_k_loss(z[:, dead], leaves.decoder[dead], errors[:, -1], k_aux)
    (main + alpha * aux).backward()

    torch.testing.assert_close(found.loss, main.detach())
    torch.testing.assert_close(found.aux_loss, aux.detach())
    torch.testing.assert_close(found.residual, errors[:, -1].detach())
    for mine, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(mine, leaf.grad, atol=1e-10, rtol=1e-8)


# -- the dictionary --------------------------------------------------------------------------------


def dictionary(**changes: Any) -> KronSAE:
    sae = KronSAE(KronSAEConfig(**{"d_in": 12, "h": 8, "m": 3, "n": 4, "k": 5, "metadata": {"a": 1}, **changes}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def test_a_dictionary_has_the_parameters_of_the_paper() -> None:
    sae = dictionary()
    assert sum(p.numel() for p in sae.parameters()) == 12 * 8 * 7 + 8 * 7 + 96 * 12 + 12
    assert (sae.W_enc.shape, sae.b_enc.shape, sae.W_dec.shape) == ((12, 56), (56,), (96, 12))
    assert sae.config.n_latents == 96


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_dictionary_encodes_and_decodes_as_specified(apply_b_dec_to_input: bool) -> None:
    sae = dictionary(apply_b_dec_to_input=apply_b_dec_to_input)
    x = inputs(50, d=12).float()
    centred = x - sae.b_dec if apply_b_dec_to_input else x
    z = latents_dense(centred, sae.encoder, sae.encoder_bias, sae.config.encoding)
    top = z.topk(5, dim=-1)
    kept = torch.zeros_like(z).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(x), kept)
    torch.testing.assert_close(sae(x), kept @ sae.W_dec + sae.b_dec)
    assert (sae.encode(x) > 0).sum(-1).max() <= 5


@pytest.mark.parametrize("k", [1, 3])
def test_fewer_latents_are_among_those_of_more(k: int) -> None:
    sae, x = dictionary(), inputs(50, d=12).float()
    few, many = sae.encode(x, k), sae.encode(x)
    assert ((few > 0) <= (many > 0)).all()
    assert ((few > 0).sum(-1) <= k).all()
    torch.testing.assert_close(few[few > 0], many[few > 0])


def test_more_latents_than_trained_are_warned_about_and_more_than_all_refused() -> None:
    sae, x = dictionary(), inputs(3, d=12).float()
    with pytest.warns(UserWarning, match="k=6 is more than the k=5 of training"):
        sae.encode(x, 6)
    with pytest.raises(TrimtabError, match="k=97 must lie between 1 and n_latents=96"):
        sae.encode(x, 97)
    with pytest.raises(TrimtabError, match="x has 11 features"):
        sae.encode(x[:, :11])


@pytest.mark.parametrize("activation", ["mand", "relu_product", "product"])
@pytest.mark.parametrize("mask_inactive", [True, False])
def test_scales_fold_into_the_weights_exactly(activation: str, mask_inactive: bool) -> None:
    sae = dictionary(activation=activation, mask_inactive=mask_inactive, eps=0.3).double()
    x = inputs(20, d=12)
    before = sae.encode(x / 3.0), sae(x / 3.0)
    sae.fold_scales(3.0, 5.0)
    torch.testing.assert_close(sae.encode(x), 5.0 * before[0])
    torch.testing.assert_close(sae(x), 5.0 * before[1])


@pytest.mark.parametrize("changes", [{}, {"d_out": 7, "transcoder": True}, {"activation": "product"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    sae = dictionary(**changes).to(dtype)
    sae.save_pretrained(tmp_path)
    for back in (KronSAE.from_pretrained(tmp_path), TopKSAE.from_pretrained(tmp_path)):
        assert isinstance(back, KronSAE)
        assert back.config == sae.config
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), sae.parameters(), strict=True))
    listing = load_file(tmp_path / "sae_weights.safetensors")["W_enc"]
    assert torch.equal(listing, head_major(sae.encoder, sae.config.encoding).T)
    assert "Kron" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 95}, "d_sae=95 is not h m n = 96"),
        ({"h": 0}, "h=0"),
        ({"h": 10**12}, "beyond"),
        ({"eps": "small"}, "eps='small'; accepted: a number"),
        ({"activation": "max"}, "activation='max'"),
        ({"m": 4, "n": 3}, None),
    ],
)
def test_a_spoilt_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    dictionary().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(fields | changes))
    if message is None:  # another shape of the same size is another dictionary, which nobody can tell
        assert KronSAE.from_pretrained(tmp_path).config.m == 4
    else:
        with pytest.raises(TrimtabError, match=message):
            KronSAE.from_pretrained(tmp_path)


def test_low_precision_is_close_to_float32() -> None:
    sae, x = dictionary(k=96), inputs(50, d=12).float()  # all latents: near ties would else change places
    low = dictionary(k=96).to(torch.bfloat16)(x)
    assert (low - sae(x)).norm() < 1e-2 * sae(x).norm()


def test_heads_are_ordered_in_float32_whatever_the_inputs_precision() -> None:
    """Half precision overflows at p q > 65,504: all heads would look alike."""
    shape = encoding(64, 2, 2)
    w = weights(shape, d=16)
    x = (60 * inputs(20, d=16)).half()
    encoder, bias = w.encoder.half(), w.encoder_bias.half()
    found, _ = shape.top(x, encoder, bias, 4)
    exact = latents_dense(x, encoder, bias, shape).topk(4, dim=-1).values
    assert exact.max() > 300
    torch.testing.assert_close(found.values.sort(descending=True).values, exact.half(), rtol=2e-3, atol=0)


def test_an_eps_of_zero_is_saved_and_loaded(tmp_path: Path) -> None:
    sae = dictionary(eps=0.0)
    sae.save_pretrained(tmp_path)
    assert KronSAE.from_pretrained(tmp_path).config.eps == 0


def test_dictionaries_of_other_libraries_have_no_such_encoder(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="a KronSAE was to be written for sparsify"):
        write_sparsify(dictionary(), tmp_path, "layers.0")


# -- weights, costs, bad input ---------------------------------------------------------------------


def test_initial_weights_are_those_of_the_listing() -> None:
    shape = encoding(64, 4, 4)
    encoder, decoder = initial_weights(shape, 32, torch.Generator().manual_seed(0))
    assert encoder.std().item() == pytest.approx((2 * shape.n_latents) ** -0.5, rel=0.02)
    torch.testing.assert_close(decoder.norm(dim=-1), torch.ones(shape.n_latents))
    rows = head_major(encoder, shape).unflatten(0, (64, 8))
    for k, i, j in ((0, 0, 0), (5, 2, 3), (63, 3, 1)):
        expected = rows[k, i] + rows[k, 4 + j]
        torch.testing.assert_close(decoder[k * 16 + i * 4 + j], expected / expected.norm())


def test_the_listings_order_and_back() -> None:
    shape = encoding()
    rows = torch.arange(shape.rows).float()
    listed = head_major(rows, shape)
    assert listed.tolist()[:6] == [0, 3, 6, 9, 12, 15]  # head 0: two bases, four extensions, h = 3 apart
    assert torch.equal(head_major(listed, shape, inverse=True), rows)


def test_costs() -> None:
    assert flops_topk(64, 2048, 10) == 64 * 2048 + 640
    assert flops_kron(64, 128, 4, 4, 10) == 64 * 128 * 8 + 2048 + 640
    assert encoding(128, 4, 4).rows / encoding(128, 4, 4).n_latents == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"h": 0}, "h=0"),
        ({"m": -1}, "m=-1"),
        ({"n": 0}, "n=0"),
        ({"eps": -1e-5}, "eps=-1e-05"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_bad_shapes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        KronEncoding(**({"h": 3, "m": 2, "n": 4} | options))


@pytest.mark.parametrize(("m", "n"), [(1, 4), (2, 2), (4, 1)])
def test_a_shape_that_saves_nothing_is_warned_about(m: int, n: int) -> None:
    with pytest.warns(UserWarning, match=rf"m={m}, n={n}: .* a dense encoder has no more"):
        KronEncoding(h=2, m=m, n=n)
