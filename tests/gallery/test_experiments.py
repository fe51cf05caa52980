"""The experiments on sparse codes: what their test beds are, and that their arms measure what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.gallery import load, slugs
from trimtab.gallery.experiments import hierarchical_topk, kron_sae
from trimtab.gallery.testbeds.sparse_codes import Compositional, Skewed


def test_every_experiment_can_be_loaded_and_belongs_to_its_slug() -> None:
    assert {"topk-sae", "kron-sae", "hierarchical-topk"} <= set(slugs())
    assert all(load(slug).method == slug for slug in slugs())


@pytest.mark.parametrize("bed", [Compositional(), Skewed()])
def test_samples_are_those_of_their_seeds(bed: Any) -> None:
    first = bed.sample(50, seed=1)
    assert first.shape == (50, 64)
    assert torch.equal(first, bed.sample(50, seed=1))
    assert not torch.equal(first, bed.sample(50, seed=2))
    assert not torch.equal(first, type(bed)(seed=5).sample(50, seed=1))


def test_compositional_rows_are_sums_of_few_atoms() -> None:
    bed = Compositional(groups=1, d=48)
    rows = bed.sample(2000, seed=0)
    silent = (rows == 0).all(1)
    assert silent.double().mean().item() == pytest.approx(0.6, abs=0.04)
    assert torch.linalg.matrix_rank(rows) == 32  # atoms of 4 bases x 8 extensions, each with noise of its own


def test_skewed_features_are_on_as_often_as_they_should_be() -> None:
    bed = Skewed(d=512, features=512)
    rows = bed.sample(4000, seed=0)
    directions = torch.nn.functional.normalize(
        torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    on = torch.linalg.solve(directions.T.double(), rows.T.double()).T.abs() > 1e-3
    assert on.double().sum(1).mean().item() == pytest.approx(16, rel=0.03)
    share = on.double().mean(0)
    assert share[0].item() == pytest.approx(0.6, abs=0.03)
    assert share[300:].mean() < 0.03


def test_kron_arms_have_equal_encoder_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kron_sae, "BASES", (12, 18))
    monkeypatch.setattr(kron_sae, "RATES", (8e-3,))
    arms = {name: arm for name, (_, arm) in kron_sae.EXPERIMENT.arms.items()}
    dense = arms["TopK"](0)
    for name in ("KronSAE (4, 4), equal FLOPs", "KronSAE (4, 8), equal FLOPs"):
        kron = arms[name](0)
        for base in (12, 18):
            cost, peer = (found[f"steps, base {base}"] * found["encoder parameters"] for found in (kron, dense))
            assert cost == peer
    equal = arms["KronSAE (4, 4), equal tokens"](0)
    assert equal["steps, base 18"] == dense["steps, base 18"]
    assert 0 < equal[kron_sae.METRIC] < kron[kron_sae.METRIC] < 1


def test_hierarchical_arms_are_read_at_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hierarchical_topk, "STEPS", 60)
    arms = load("hierarchical-topk").arms
    measured = {name: arms[name][1](0) for name in ("HierarchicalTopK, every prefix", "TopK 32", "Matryoshka 32")}
    for figures in measured.values():
        assert isinstance(figures, dict)
        curve = [figures[f"EV at {j}"] for j in (1, 2, 4, 8, 16, 32)]
        assert figures["mean explained variance"] == pytest.approx(sum(curve) / 6)
    first = [measured[name]["EV at 1"] for name in ("HierarchicalTopK, every prefix", "TopK 32")]
    assert first[0] > first[1]
