"""Do the directions of a dictionary correlate as the features behind the activations do? The RV coefficient.

Sources: Robert and Escoufier (1976) for RV; KronSAE, arXiv 2505.22255v3, section 5, for its use on dictionaries. With
S [F, F] the covariance of the true features, W [F, d] their directions and D [F, d] the decoder, rows as features:

    C = D D^T,   RV(S, C) = trace(S C) / sqrt(trace(S^2) trace(C^2))        1 for C in proportion to S

Latents come in any order, and RV depends on it. So each is first matched to a feature: the permutation P that
maximises trace(P^T (W W^T) P (D D^T)), a quadratic assignment, which the FAQ algorithm (Vogelstein et al. 2015) solves
approximately, starting from the uniform matrix; scipy has it.

`trimtab.gallery.testbeds.sparse_codes` has the paper's toy setting, `Correlated` and `superposition`. The paper's
figures for it have not been reproduced.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = ["correlation_recovery", "match_latents", "rv_coefficient"]


def rv_coefficient(first: Tensor, second: Tensor) -> float:
    """RV of two symmetric matrices of one shape, in float64: from -1 to 1, and from 0 for covariances.

    Raises TrimtabError for matrices that are not square, not of one shape, not finite, or zero.
    """
    _check(first=first, second=second)
    if first.shape != second.shape:
        raise TrimtabError(f"first is {list(first.shape)} and second {list(second.shape)}; accepted: one shape")
    a, b = first.double(), second.double()
    norms = a.norm() * b.norm()
    if not norms > 0:
        raise TrimtabError("a matrix of zeros has no RV coefficient; accepted: one with entries other than 0")
    return ((a * b.T).sum() / norms).item()


def match_latents(reference: Tensor, gram: Tensor) -> Int[Tensor, " features"]:
    """The order of latents in which `gram` agrees best with `reference`: gram[order][:, order], found by FAQ.

    Both square, of one shape. An approximation: the problem is NP-hard. Its time grows with the third power of the
    size. Raises TrimtabError as `rv_coefficient` does.
    """
    from scipy.optimize import quadratic_assignment

    _check(reference=reference, gram=gram)
    if reference.shape != gram.shape:
        raise TrimtabError(f"reference is {list(reference.shape)} and gram {list(gram.shape)}; accepted: one shape")
    a, b = (matrix.detach().double().cpu().numpy() for matrix in (reference, gram))
    options = {
        "maximize": True,
        "rng": np.random.default_rng(0),
    }  # which FAQ from the uniform matrix does not draw from
    return torch.from_numpy(quadratic_assignment(a, b, method="faq", options=options).col_ind).long()


def correlation_recovery(
    covariance: Float[Tensor, "features features"],
    directions: Float[Tensor, "features d"],
    decoder: Float[Tensor, "features d"],
) -> float:
    """RV of the features' `covariance` and the decoder's D D^T, after latents were matched to `directions`."""
    gram = decoder @ decoder.T
    order = match_latents(directions @ directions.T, gram).to(gram.device)
    return rv_coefficient(covariance.to(gram.device), gram[order][:, order])


def _check(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise TrimtabError(f"{name} of shape {list(matrix.shape)}; accepted: a square matrix")
        if not torch.isfinite(matrix).all():
            raise TrimtabError(f"{name} holds NaN or infinity; accepted: finite numbers")
