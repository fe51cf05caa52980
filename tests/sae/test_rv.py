"""RV coefficients and the matching of latents: identities, permutations that are known, and the toy setting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.sparse_codes import Correlated, superposition
from trimtab.sae.correlation_recovery import correlation_recovery, match_latents, rv_coefficient


def covariance(size: int = 12, seed: int = 0) -> Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def shuffled(size: int, seed: int = 1) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


# -- RV ----------------------------------------------------------------------------------------------


def test_equal_and_proportional_matrices_have_rv_one() -> None:
    s = covariance()
    assert rv_coefficient(s, s) == pytest.approx(1, abs=1e-12)
    assert rv_coefficient(s, 7 * s) == pytest.approx(1, abs=1e-12)
    assert rv_coefficient(s, -s) == pytest.approx(-1, abs=1e-12)


def test_rv_is_its_formula() -> None:
    s, c = covariance(seed=0), covariance(seed=1)
    expected = torch.trace(s @ c) / (torch.trace(s @ s) * torch.trace(c @ c)).sqrt()
    assert rv_coefficient(s, c) == pytest.approx(expected.item(), rel=1e-12)
    assert rv_coefficient(s.float(), c) == pytest.approx(rv_coefficient(c, s.float()), rel=1e-12)


def test_matrices_without_a_common_entry_have_rv_zero() -> None:
    s, c = torch.zeros(2, 4, 4)
    s[0, 1] = s[1, 0] = c[2, 3] = c[3, 2] = 1
    assert rv_coefficient(s, c) == 0


# -- matching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_permutation_is_found_again(seed: int) -> None:
    s = covariance(seed=seed)
    order = shuffled(12, seed)
    assert rv_coefficient(s, s[order][:, order]) < 0.95
    found = match_latents(s, s[order][:, order])
    assert torch.equal(order[found], torch.arange(12))


def test_permuted_latents_recover_the_correlations() -> None:
    directions = torch.linalg.cholesky(covariance())
    covariances = directions @ directions.T
    assert correlation_recovery(covariances, directions, directions[shuffled(12)]) == pytest.approx(1, abs=1e-12)
    # Latents that have the directions of other features are matched to them, whatever the covariance is.
    other = covariance(seed=5)
    assert correlation_recovery(other, directions, directions[shuffled(12)]) == pytest.approx(
        rv_coefficient(other, covariances)
    )


def test_what_is_no_covariance_is_named() -> None:
    s = covariance()
    for function in (rv_coefficient, match_latents):
        with pytest.raises(TrimtabError, match=r"of shape \[12, 3\]; accepted: a square matrix"):
            function(s[:, :3], s)
        with pytest.raises(TrimtabError, match="accepted: one shape"):
            function(s, s[:3, :3])
        with pytest.raises(TrimtabError, match="holds NaN or infinity"):
            function(s, s / 0)
    with pytest.raises(TrimtabError, match="a matrix of zeros"):
        rv_coefficient(s, 0 * s)


# -- the toy setting ---------------------------------------------------------------------------------


def test_features_are_sparse_until_the_covariance_mixes_them() -> None:
    bed = Correlated(features=24, blocks=4, active=3)
    s = bed.covariance()
    assert torch.equal(s, s.T)
    assert torch.equal(s.diagonal(), torch.ones(24, dtype=torch.float64))
    assert torch.equal(s != 0, torch.block_diag(*[torch.ones(6, 6)] * 4).bool())
    x = bed.sample(500, seed=0)
    sparse = torch.linalg.solve_triangular(torch.linalg.cholesky(s), x.double().T, upper=False).T
    assert ((sparse > 1e-4).sum(1) <= 3).all()
    assert (sparse > -1e-4).all()
    assert torch.equal(x, bed.sample(500, seed=0))
    assert not torch.equal(x, bed.sample(500, seed=1))


def test_superposition_keeps_what_it_can_of_the_features() -> None:
    bed = Correlated(features=24, blocks=4, active=2)
    directions = superposition(bed, 12, steps=400)
    untrained = superposition(bed, 12, steps=0)
    assert directions.shape == (24, 12)
    x = bed.sample(2000, seed=-1)
    errors = [1 - (x - x @ w @ torch.linalg.pinv(w)).square().sum() / x.square().sum() for w in (directions, untrained)]
    assert errors[0] > errors[1] + 0.1
