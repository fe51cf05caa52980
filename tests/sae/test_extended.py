"""Latents added inside a frozen dictionary, grafted ones, and decoders that do not train."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.sparse_codes import Skewed
from trimtab.sae import (
    BoostedSAE,
    DictionaryConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    TensorShards,
    TopKSAE,
    TopKSAEConfig,
    TrainingConfig,
    train,
)
from trimtab.sae.extended import NOISE, changes, extend_weights, graft
from trimtab.sae.functional import Weights
from trimtab.sae.metrics import reconstruction

D, OLD, NEW = 24, 32, 8
STAYS = ("encoder", "encoder_bias", "decoder")


def codes(tokens: int, seed: int, *, domain: bool = False) -> Tensor:
    """General rows; with `domain`, rows that other directions make too. Their mean is far from 0."""
    x = Skewed(d=D, features=40, active=2.0).sample(tokens, seed=seed)
    if domain:
        x = x + 1.5 * Skewed(d=D, features=6, active=1.0, seed=7).sample(tokens, seed=seed + 1)
    return 3 * x + 5


def settings(**changes: Any) -> TrainingConfig:
    values = {"tokens": 10_000, "batch_size": 100, "learning_rate": 1e-2, "dead_after": 1_000, "checkpoint_every": 50}
    return TrainingConfig(**(values | changes))


@pytest.fixture(scope="module", params=[True, False], ids=["subtracting b_dec", "not"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    out = tmp_path_factory.mktemp("base")
    dictionary = DictionaryConfig(place="x", n_latents=OLD, k=3, sparsifier="batch_topk")
    run = settings(apply_b_dec_to_input=request.param)
    train([dictionary], TensorShards({"x": codes(10_000, 0)}), run, out)
    return out / "x", request.param


def extended(directory: Path, init: str = "random", **changes: Any) -> DictionaryConfig:
    fields: dict[str, Any] = {
        "place": "x",
        "n_latents": OLD + NEW,
        "k": 4,
        "sparsifier": "batch_topk",
        "extend": str(directory),
        "extend_init": init,
    }
    return DictionaryConfig(**(fields | changes))


@pytest.mark.parametrize("init", ["random", "most_active"])
def test_old_latents_stay_bit_for_bit_and_new_ones_learn(base: tuple[Path, bool], tmp_path: Path, init: str) -> None:
    directory, subtract = base
    old = TopKSAE.from_pretrained(directory)
    shards = TensorShards({"x": codes(10_000, 2, domain=True)})
    run = settings(apply_b_dec_to_input=subtract, keep_last=9)
    sae = train([extended(directory, init)], shards, run, tmp_path / "whole")["x"]
    for name in STAYS:
        assert torch.equal(getattr(sae, name)[:OLD], getattr(old, name))
    assert torch.equal(sae.decoder_bias, old.decoder_bias)
    torch.testing.assert_close(sae.decoder[OLD:].norm(dim=-1), torch.ones(NEW))
    held_out = codes(2_000, 5, domain=True)
    before, after = (reconstruction(part, held_out) for part in (old, sae))
    assert after["explained_variance"] > before["explained_variance"] + 0.05
    assert after["densities"][OLD:].sum() > 0.2
    assert after["l0"] == pytest.approx(4, rel=0.25)

    copied = tmp_path / "part" / "checkpoints" / "step-00000050"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / copied.name, copied)
    resumed = train([extended(directory, init)], shards, run, tmp_path / "part")["x"]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), sae.parameters(), strict=True))


def checkpointed(run: Path, step: int) -> dict[str, Tensor]:
    from trimtab.core import checkpoint

    root = run / "checkpoints"
    for found in root.iterdir():
        if found.name != f"step-{step:08d}":
            shutil.rmtree(found)
    tree = checkpoint.load(root).tree
    weights: dict[str, Tensor] = tree["dictionaries"]["x"]["weights"]
    return weights


def test_old_latents_do_not_move_in_training_either(base: tuple[Path, bool], tmp_path: Path) -> None:
    """In scaled units, from the first step to the last: not only restored at the end."""
    directory, subtract = base
    shards = TensorShards({"x": codes(10_000, 2, domain=True)})
    train([extended(directory)], shards, settings(apply_b_dec_to_input=subtract, keep_last=9), tmp_path)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "b" / "checkpoints")
    first, last = checkpointed(tmp_path, 50), checkpointed(tmp_path / "b", 100)
    for name in STAYS:
        assert torch.equal(first[name][:OLD], last[name][:OLD])
        assert not torch.equal(first[name][OLD:], last[name][OLD:])
    assert torch.equal(first["decoder_bias"], last["decoder_bias"])


def test_before_training_it_is_the_base_and_what_the_new_latents_take(base: tuple[Path, bool], tmp_path: Path) -> None:
    """With the old budget, a rate of nothing, and new latents that cannot fire, outputs stay those of BatchTopK."""
    directory, subtract = base
    old, x = TopKSAE.from_pretrained(directory), codes(2_000, 2)
    still = settings(tokens=100, learning_rate=1e-12, final_learning_rate=0.0, apply_b_dec_to_input=subtract)
    sae = train([extended(directory)], TensorShards({"x": x}), still, tmp_path)["x"]
    pre = (x - old.decoder_bias * subtract) @ old.encoder.T + old.encoder_bias
    found = sae.encode(x)[:, :OLD]
    torch.testing.assert_close(found[found > 0], pre[found > 0], rtol=1e-4, atol=1e-4)


def dense(n_latents: int, seed: int) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=D, n_latents=n_latents, k=4), seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return sae


def test_new_latents_begin_as_copies_of_the_most_active() -> None:
    old, fresh, x = dense(OLD, 1), dense(OLD + 5, 2), codes(300, 3)
    weights = Weights(*(weight.detach().clone() for weight in fresh.weights))
    extend_weights(weights, old, x, init="most_active", seed=0)
    active = old.encode(x).mean(0).topk(5).indices
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(weights.decoder[OLD:], old.decoder[active]) > 1 - NOISE**2).all()
    assert (cosine(weights.encoder[OLD:], old.encoder[active]) > 1 - NOISE**2).all()
    assert not torch.equal(weights.encoder[OLD:], old.encoder[active])
    both = weights.encoder.norm(dim=-1)[OLD:], old.encoder[active].norm(dim=-1) * old.decoder[active].norm(dim=-1)
    torch.testing.assert_close(*both, rtol=2 * NOISE, atol=0.0)
    assert all(torch.equal(getattr(weights, name)[:OLD], getattr(old, name)) for name in STAYS)
    big = Weights(*(weight.detach().clone() for weight in dense(OLD + 33, 2).weights))
    with pytest.raises(TrimtabError, match="copies 33 latents; the dictionary has 32"):
        extend_weights(big, old, x, init="most_active", seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "s"}, "no meaning with start, base"),
        ({"base": "s"}, "no meaning with start, base"),
        ({"kron": (2, 4)}, "no meaning with start, base"),
        ({"extend": None, "extend_init": "most_active"}, "needs extend"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        extended(Path("d"), **options)


def test_what_cannot_be_extended_is_refused(base: tuple[Path, bool], tmp_path: Path) -> None:
    directory, subtract = base
    shards = TensorShards({"x": codes(1_000, 0), "y": codes(1_000, 0)})
    for options, changed, message in (
        ({"n_latents": OLD}, {}, "must be more than the 32 to extend"),
        ({"place": "y"}, {}, "extend=.* reads place 'x', this dictionary 'y'"),
        ({}, {"apply_b_dec_to_input": not subtract}, f"extend=.* has apply_b_dec_to_input={subtract}"),
    ):
        run = settings(**({"apply_b_dec_to_input": subtract} | changed))
        with pytest.raises(TrimtabError, match=message):
            train([extended(directory, **options)], shards, run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


# -- grafts ----------------------------------------------------------------------------------------


def jump(seed: int, *, subtract: bool = True) -> JumpReLUSAE:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, n_latents=OLD, apply_b_dec_to_input=subtract))
    with torch.no_grad():
        sae.load_state_dict(dense(OLD, seed).state_dict() | {"threshold": torch.linspace(0, 1, OLD)})
    return sae


@pytest.mark.parametrize("subtract", [True, False])
def test_the_most_changed_latents_are_grafted_as_they_fire(subtract: bool) -> None:
    old, tuned, x = jump(1, subtract=subtract), jump(1, subtract=subtract), codes(50, 2)
    with torch.no_grad():
        tuned.decoder[3] = -old.decoder[3]
        tuned.decoder[9] = torch.roll(old.decoder[9], 1)
        tuned.decoder[20] = 7 * old.decoder[20]  # longer, and no other direction
        tuned.encoder[3] += 0.1
        tuned.decoder_bias += 1
    found = changes(old, tuned)
    assert found[3] == pytest.approx(2.0, abs=1e-6)
    assert found.argsort(descending=True)[:2].tolist() == [3, 9]
    assert found[20] == pytest.approx(0.0, abs=1e-6)
    grafted = graft(old, tuned, 2)
    torch.testing.assert_close(grafted.encode(x), tuned.encode(x)[:, [3, 9]], rtol=1e-4, atol=1e-4)
    assert torch.equal(grafted.decoder, tuned.decoder[[3, 9]])
    boosted = BoostedSAE(old, {"tuned": grafted})
    torch.testing.assert_close(boosted(x), old(x) + tuned.encode(x)[:, [3, 9]] @ tuned.decoder[[3, 9]])
    torch.testing.assert_close(boosted.stitch()(x), boosted(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_grafted_is_refused() -> None:
    with pytest.raises(TrimtabError, match="count=33 must lie between 1 and n_latents=32"):
        graft(jump(1), jump(2), 33)
    with pytest.raises(TrimtabError, match=r"shape \(32, 24\); accepted: that of base, \(8, 24\)"):
        changes(dense(8, 1), jump(2))
    transcoder = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, n_latents=OLD, transcoder=True, apply_b_dec_to_input=False))
    with pytest.raises(TrimtabError, match="tuned is a transcoder"):
        graft(jump(1), transcoder, 2)


# -- frozen decoders -------------------------------------------------------------------------------


def test_a_decoder_that_does_not_train_keeps_its_random_rows(base: tuple[Path, bool], tmp_path: Path) -> None:
    directory, _ = base
    shards = TensorShards({"x": codes(10_000, 2, domain=True)})
    found, held_out = {}, codes(2_000, 5, domain=True)
    for trained in (True, False):
        dictionary = DictionaryConfig(
            place="x", n_latents=16, k=2, base=str(directory), freeze_decoder=not trained, seed=4
        )
        sae = train([dictionary], shards, settings(), tmp_path / str(trained))["x"]
        assert isinstance(sae, JumpReLUSAE)
        first = TopKSAE(TopKSAEConfig(d_in=D, n_latents=16, k=2, apply_b_dec_to_input=False), seed=4)
        assert torch.equal(sae.decoder, first.decoder) != trained
        assert not torch.equal(sae.encoder, first.encoder)
        boosted = BoostedSAE(TopKSAE.from_pretrained(directory), {"domain": sae})
        found[trained] = reconstruction(boosted, held_out)["explained_variance"]
    alone = reconstruction(TopKSAE.from_pretrained(directory), held_out)["explained_variance"]
    assert found[True] > found[False] > alone
