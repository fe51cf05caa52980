"""What a training run may be told, and what it refuses by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from trimtab.core.errors import TrimtabError
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.harvest import HarvestConfig

COUNTS = ("batch_size", "k_aux", "dead_after", "checkpoint_every", "keep_last", "log_every")


def test_an_autoencoder_reads_and_writes_one_place() -> None:
    config = DictionaryConfig(place="resid.1", n_latents=8, k=2)
    assert config.places == ("resid.1",)
    assert config.output == "resid.1"


def test_a_transcoder_reads_one_place_and_writes_another() -> None:
    config = DictionaryConfig(place="resid.1", target="mlp.2", n_latents=8, k=2)
    assert config.places == ("resid.1", "mlp.2")
    assert config.output == "mlp.2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_latents": 0}, r"n_latents=0 must be a whole number of at least 1"),
        ({"n_latents": -4}, r"n_latents=-4 must be a whole number"),
        ({"k": 0}, r"k=0 must be a whole number of at least 1"),
        ({"kron_mask_inactive": False}, "kron_mask_inactive=False is for a KronSAE"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"k": 9}, r"k=9 must lie between 1 and n_latents=8"),
        ({"target": "resid.1"}, r"target='resid\.1' is the place itself"),
        ({"seed": -1}, r"seed=-1 must be a whole number of at least 0"),
    ],
)
def test_dictionaries_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        DictionaryConfig(**({"place": "resid.1", "n_latents": 8, "k": 2} | changes))


@pytest.mark.parametrize(("tokens", "steps"), [(100, 1), (199, 1), (200, 2), (1050, 10)])
def test_steps_are_whole_batches(tokens: int, steps: int) -> None:
    assert TrainingConfig(tokens=tokens, batch_size=100).steps == steps


def test_a_latent_is_dead_after_a_tenth_of_the_tokens_or_what_is_said() -> None:
    assert TrainingConfig(tokens=5_005, batch_size=100).dead_after_tokens == 500
    assert TrainingConfig(tokens=5, batch_size=1).dead_after_tokens == 1
    assert TrainingConfig(tokens=5_000, batch_size=100, dead_after=7).dead_after_tokens == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, rf"{name}=0 must be .*at least 1") for name in COUNTS),
        *(({name: -5}, rf"{name}=-5 must be .*at least 1") for name in COUNTS),
        ({"tokens": 99}, r"tokens=99 is less than one batch of batch_size=100"),
        *(({"learning_rate": value}, r"learning_rate=.* must be positive") for value in (0.0, -1.0)),
        *(
            ({"final_learning_rate": value}, r"final_learning_rate=.* between 0 and learning_rate")
            for value in (-1e-9, 1.0, math.nan)
        ),
        *(({"warmup": value}, r"warmup=.* between 0 and 1") for value in (-0.1, 1.1, math.nan)),
        ({"alpha": -1.0}, r"alpha=-1.0 must be 0 or above"),
        *(
            ({name: value}, rf"{name}={value} must be finite")
            for name in ("learning_rate", "alpha")
            for value in (math.nan, math.inf)
        ),
        *(({"grad_clip": value}, r"grad_clip=.* must be positive, or None") for value in (0.0, math.nan)),
    ],
)
def test_training_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        TrainingConfig(**({"tokens": 1000, "batch_size": 100} | changes))


def test_the_ends_of_the_ranges_are_accepted() -> None:
    for changes in (
        {"warmup": 0.0},
        {"warmup": 1.0},
        {"final_learning_rate": 0.0},
        {"final_learning_rate": 8e-4},
        {"alpha": 0.0},
        {"grad_clip": None},
        {"tokens": 100},
    ):
        config = TrainingConfig(**({"tokens": 1000, "batch_size": 100} | changes))
        assert {name: getattr(config, name) for name in changes} == changes


def test_configurations_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig(tokens=10_000).tokens = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", ["context", "sequences_per_forward", "shard_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_harvests_that_cannot_be_are_refused(name: str, value: int) -> None:
    with pytest.raises(TrimtabError, match=f"{name}={value} must be an integer of at least 1"):
        HarvestConfig(**{name: value})


@pytest.mark.parametrize("ratio", [1.0, 0.0, -3.0, math.nan])
def test_a_sink_is_larger_than_the_median(ratio: float) -> None:
    with pytest.raises(TrimtabError, match=r"sink_norm_ratio=.* above 1, or None"):
        HarvestConfig(sink_norm_ratio=ratio)


@pytest.mark.parametrize(("shard_tokens", "sequences"), [(1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_shard_holds_whole_sequences(shard_tokens: int, sequences: int) -> None:
    assert HarvestConfig(context=16, shard_tokens=shard_tokens).sequences_per_shard == sequences
