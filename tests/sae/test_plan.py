"""The plan of a run against the run itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae import DictionaryConfig, Harvest, HarvestConfig, ShardCache, TrainingConfig, train
from trimtab.sae.plan import plan

DICTIONARIES = [
    DictionaryConfig(place="resid.1", n_latents=4000, k=4),
    DictionaryConfig(place="resid.0", target="mlp.1", n_latents=3000, k=4),
]
TRAINING = TrainingConfig(tokens=600, batch_size=100, keep_last=1)


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Harvest:
    words = " ".join(f"w{i}" for i in range(60))
    config = HarvestConfig(context=32, sequences_per_forward=2, shard_tokens=256)
    return Harvest(tiny_llama, tiny_tokenizer, TextSource([words] * 5), ["resid.1", "resid.0", "mlp.1"], config)


def test_every_figure_is_positive_and_the_text_says_it(harvest: Harvest) -> None:
    found = plan(DICTIONARIES, harvest, TRAINING, cached=True)
    assert found.names == ("resid.1", "resid.0-to-mlp.1")
    assert found.tokens == 600
    assert all(value > 0 for name, value in asdict(found).items() if name != "names")
    text = str(found)
    assert "would train 2 dictionaries (resid.1, resid.0-to-mlp.1) on 600 tokens" in text
    assert all(word in text for word in ("time", "memory", "disk"))
    assert plan(DICTIONARIES, harvest, TRAINING, cached=False).cache_bytes == 0


def test_bytes_on_disk_are_those_of_the_files(harvest: Harvest, tmp_path: Path) -> None:
    found = plan(DICTIONARIES, harvest, TRAINING, cached=True)
    cache = ShardCache(harvest, tmp_path / "cache")
    train(DICTIONARIES, cache, TRAINING, tmp_path / "out")

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    written = sum(size(tmp_path / "out" / name) for name in found.names)
    assert found.output_bytes == pytest.approx(written, rel=0.02)
    assert found.checkpoint_bytes == pytest.approx(size(tmp_path / "out" / "checkpoints"), rel=0.03)
    row = 4 * 32 * 3
    assert found.cache_bytes == 600 * row
    # What was cached is what was needed, in whole shards.
    assert 600 * row <= size(tmp_path / "cache") <= (600 + 2 * 256) * row * 1.05


def test_a_base_and_its_memory_are_in_the_plan(harvest: Harvest, tmp_path: Path) -> None:
    train(DICTIONARIES[:1], harvest, TRAINING, tmp_path)
    residual = {"place": "resid.1", "n_latents": 100, "k": 4, "sparsifier": "batch_topk"}
    with_base = plan([DictionaryConfig(**residual, base=str(tmp_path / "resid.1"))], harvest, TRAINING, cached=False)
    without = plan([DictionaryConfig(**residual)], harvest, TRAINING, cached=False)
    assert with_base.memory_bytes - without.memory_bytes == 4 * (4000 * (2 * 32 + 1) + 32)


def test_nothing_is_written_and_nothing_changes(
    harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    before = harvest.shard(0)["resid.1"]
    plan(DICTIONARIES, harvest, TRAINING, cached=True)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(harvest.shard(0)["resid.1"], before)


def test_what_cannot_be_trained_cannot_be_planned(harvest: Harvest, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(TrimtabError, match="twice"):
        plan([DICTIONARIES[0]] * 2, harvest, TRAINING, cached=False)
    with pytest.raises(TrimtabError, match=r"place='resid\.2' is not known"):
        plan([DictionaryConfig(place="resid.2", n_latents=8, k=2)], harvest, TRAINING, cached=False)
    with pytest.raises(TrimtabError, match=r"dictionaries=\[\]"):
        plan([], harvest, TRAINING, cached=False)
    empty = Harvest(tiny_llama, tiny_tokenizer, TextSource([]), ["resid.1"], harvest.config)
    with pytest.raises(TrimtabError, match="is empty"):
        plan(DICTIONARIES[:1], empty, TRAINING, cached=False)
