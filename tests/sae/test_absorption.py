"""Absorption: latents made so that its score is known, SAEBench's definition written out, and the test bed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.sparse_codes import Hierarchy, HierarchySample
from trimtab.sae.absorption import AbsorptionReport, absorption, parent_latents, token_absorption
from trimtab.sae.encodings import Latents
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

PARENTS, CHILDREN = 3, 2
DIRECTIONS = torch.eye(PARENTS * (1 + CHILDREN)).view(PARENTS, 1 + CHILDREN, -1)


def sample(tokens: int = 400) -> tuple[HierarchySample, Tensor]:
    """Orthogonal features with one child of a parent at most, and their magnitudes [tokens, parents, 1 + children]."""
    g = torch.Generator().manual_seed(0)
    parents = torch.rand(tokens, PARENTS, generator=g) < 0.4
    which = torch.randint(0, 2 * CHILDREN, (tokens, PARENTS), generator=g)
    children = (which[..., None] == torch.arange(CHILDREN)) & parents[..., None]
    on = torch.cat([parents[..., None], children], -1)
    magnitudes = on * (0.5 + torch.rand(on.shape, generator=g))
    return HierarchySample(magnitudes.flatten(1) @ DIRECTIONS.flatten(0, 1), parents, children), magnitudes


def absorbed(share: float) -> tuple[Tensor, Tensor]:
    """Latents and decoder: of the parent's magnitude, `share` goes to the latent of the child that is on."""
    bed, magnitudes = sample()
    parent = magnitudes[..., :1]
    latents = torch.cat([parent * (1 - share * bed.children.any(-1, keepdim=True)), bed.children * parent], -1)
    rows = DIRECTIONS.clone()
    rows[:, 1:] += share * DIRECTIONS[:, :1]
    return latents.flatten(1), rows.flatten(0, 1)


def report(latents: Latents | Tensor, decoder: Tensor, **changes: Any) -> AbsorptionReport:
    bed, _ = sample()
    options = {"parents": bed.parents, "children": bed.children, "directions": DIRECTIONS[:, 0], **changes}
    return absorption(latents, bed.x, decoder, **options)


# -- scores that are known ---------------------------------------------------------------------------


def test_children_that_take_over_the_parent_absorb_it_fully() -> None:
    found = report(*absorbed(1.0))
    assert found.latent.tolist() == [0, 3, 6]
    for field in ("f1", "recall_alone", "full_absorption", "absorption_fraction", "recall_drop"):
        torch.testing.assert_close(getattr(found, field), torch.ones(PARENTS))
    assert torch.equal(found.recall_with_child, torch.zeros(PARENTS))
    bed, _ = sample()
    share = bed.children.any(-1).sum(0) / bed.parents.sum(0)
    torch.testing.assert_close(found.saebench_full_absorption, share)
    torch.testing.assert_close(found.saebench_absorption_fraction, share)


def test_children_beside_their_parent_absorb_nothing() -> None:
    found = report(*absorbed(0.0))
    assert found.latent.tolist() == [0, 3, 6]
    for field in ("f1", "recall_alone", "recall_with_child"):
        torch.testing.assert_close(getattr(found, field), torch.ones(PARENTS))
    for field in ("full_absorption", "absorption_fraction", "saebench_absorption_fraction", "recall_drop"):
        assert torch.equal(getattr(found, field), torch.zeros(PARENTS))


@pytest.mark.parametrize(("share", "fraction"), [(0.3, 0.0), (0.45, 0.45), (0.8, 0.8)])
def test_a_part_counts_from_two_fifths_on(share: float, fraction: float) -> None:
    found = report(*absorbed(share))
    torch.testing.assert_close(found.absorption_fraction, torch.full((PARENTS,), fraction))
    assert torch.equal(found.full_absorption, torch.zeros(PARENTS))
    assert torch.equal(found.recall_drop, torch.zeros(PARENTS))
    summary = found.summary()
    assert summary["absorption_fraction"] == pytest.approx(fraction)
    assert "latent" not in summary


def test_neither_the_scale_of_rows_nor_that_of_directions_matters() -> None:
    latents, decoder = absorbed(0.8)
    scale = 0.1 + torch.rand(decoder.shape[0], generator=torch.Generator().manual_seed(2))
    found = report(latents / scale, decoder * scale[:, None], directions=5 * DIRECTIONS[:, 0])
    torch.testing.assert_close(found.summary(), report(latents, decoder).summary())


def test_dense_and_sparse_latents_give_one_report() -> None:
    latents, decoder = absorbed(1.0)
    values, indices = latents.topk(9, dim=-1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    sparse = Latents(values[:, order], torch.where(values > 0, indices, 4)[:, order])  # slots of 0 name any latent
    assert report(sparse, decoder).summary() == report(latents, decoder).summary()


# -- the definitions ---------------------------------------------------------------------------------


def test_the_latent_of_a_parent_is_the_best_by_f1_where_no_child_is() -> None:
    bed, _ = sample()
    g = torch.Generator().manual_seed(3)
    latents = (torch.rand(len(bed.x), 20, generator=g) - 0.5).relu()
    index, f1 = parent_latents(latents, bed.parents, bed.children)
    for parent in range(PARENTS):
        looked_at = ~bed.children[:, parent].any(-1)
        truth = bed.parents[looked_at, parent]
        scores = []
        for latent in range(20):
            says = latents[looked_at, latent] > 0
            precision, recall = (says & truth).sum() / says.sum(), (says & truth).sum() / truth.sum()
            scores.append((2 * precision * recall / (precision + recall)).item())
        assert scores[index[parent]] == max(scores)
        assert f1[parent].item() == pytest.approx(max(scores))


def saebench(acts: Tensor, main: int, x: Tensor, rows: Tensor, probe: Tensor) -> tuple[bool, float]:
    """One token, in the words of SAEBench's calculator, whose decoder rows are of norm 1."""
    cosines = torch.nn.functional.cosine_similarity(probe, rows, dim=-1)
    projections, whole = acts * cosines, (x @ probe).item()
    own = projections[main].item()
    candidates = torch.tensor([i != main and cosines[i] >= 0.1 and projections[i] > 0 for i in range(len(acts))])
    others = projections[candidates].topk(min(3, int(candidates.sum()))).values.sum().item()
    if own >= whole or others / whole < 0.4:
        fraction = 0.0
    elif own <= 0:
        fraction = 1.0
    else:
        taken = min(others, whole - own)
        fraction = taken / (taken + own)
    top = int(projections.argmax())
    full = (
        acts[main].item() == 0
        and cosines[top].item() >= 0.025
        and whole >= 0
        and projections[top].item() / whole >= 0.4
    )
    return full, fraction


def test_a_token_is_absorbed_as_in_saebench() -> None:
    g = torch.Generator().manual_seed(4)
    rows = torch.nn.functional.normalize(torch.randn(12, 5, generator=g, dtype=torch.float64), dim=-1)
    probe = torch.nn.functional.normalize(torch.randn(5, generator=g, dtype=torch.float64), dim=-1)
    acts = (torch.randn(600, 12, generator=g, dtype=torch.float64) - 0.7).relu()
    x = acts @ rows + 0.3 * torch.randn(600, 5, generator=g, dtype=torch.float64)
    seen = set()
    for main in (0, 5, 11):
        found = token_absorption(acts, main, x, rows, probe)
        expected = [saebench(acts[t], main, x[t], rows, probe) for t in range(600)]
        assert found.full.tolist() == [full for full, _ in expected]
        assert found.fraction.tolist() == pytest.approx([fraction for _, fraction in expected])
        seen |= {(full, fraction in (0, 1)) for full, fraction in expected}
    assert seen == {(False, False), (False, True), (True, True)}


def test_a_trained_dictionary_can_be_measured() -> None:
    bed = Hierarchy()
    x, parents, children = bed.sample(2000, seed=1)
    sae = TopKSAE(TopKSAEConfig(d_in=48, n_latents=80, k=6, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.decoder.copy_(bed.directions().flatten(0, 1))  # a dictionary of the true features
        sae.encoder.copy_(torch.linalg.pinv(bed.directions().flatten(0, 1)).T)
    found = absorption(
        sae.encode_sparse(x), x, sae.decoder, parents=parents, children=children, directions=bed.directions()[:, 0]
    )
    assert found.latent.tolist() == list(range(0, 80, 5))
    assert (found.f1 > 0.4).all()
    assert 0 <= found.summary()["full_absorption"] <= 1


# -- the test bed ------------------------------------------------------------------------------------


def test_the_hierarchy_is_what_it_says() -> None:
    bed = Hierarchy(d=100)
    x, parents, children = bed.sample(5000, seed=3)
    assert (x.shape, parents.shape, children.shape) == ((5000, 100), (5000, 16), (5000, 16, 4))
    assert not (children.any(-1) & ~parents).any()
    assert parents.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert children[parents].float().mean().item() == pytest.approx(0.12, abs=0.01)
    directions = bed.directions()
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(16, 5))
    code = torch.linalg.lstsq(directions.flatten(0, 1).T.double(), x.T.double()).solution.T.view(5000, 16, 5)
    on = torch.cat([parents[..., None], children], -1)
    assert code[on].min() > 0.5 - 1e-4
    assert code[on].max() < 1.5 + 1e-4
    assert code[~on].abs().max() < 1e-4
    assert torch.equal(x, bed.sample(5000, seed=3).x)
    assert not torch.equal(x, bed.sample(5000, seed=4).x)
    assert not torch.equal(directions, Hierarchy(d=100, seed=1).directions())


# -- bad input ---------------------------------------------------------------------------------------


def test_labels_that_do_not_fit_are_named() -> None:
    latents, decoder = absorbed(1.0)
    bed, _ = sample()
    for changes, message in (
        ({"parents": bed.parents.float()}, r"parents of shape \[400, 3\] and torch.float32; accepted: bool"),
        ({"parents": bed.parents[:5]}, r"parents of shape \[5, 3\].* the first of the latents' 400 tokens"),
        ({"children": bed.children[..., 0]}, r"children of shape \[400, 3\].*3 dimensions"),
        ({"children": bed.children[:, :2]}, "children are those of 2 parents, of which there are 3"),
        ({"children": torch.ones_like(bed.children)}, "children are on where their parent is not"),
        ({"children": torch.zeros_like(bed.children)}, r"parents \[0, 1, 2\] are never on with one of its children"),
        ({"parents": bed.children.any(-1)}, r"parents \[0, 1, 2\] are never on without any of its children"),
        ({"directions": torch.zeros(3, 9)}, "directions hold a zero vector"),
    ):
        with pytest.raises(TrimtabError, match=message):
            report(latents, decoder, **changes)
