"""Distributions over the last axis, in log space: divergence, entropy, geometric blend, trust region, priors.

Sources: the trust region is that of trust-region behaviour blending (arXiv 2605.31159); the truncated
geometric prior over depth is PonderNet's and PALBERT's (arXiv 2204.03276), the non-central chi-squared one
VARAN's (arXiv 2508.12061).

Symbols: `log_p`, `log_q` are log-probabilities (-inf is probability 0, and 0 log 0 = 0), r = log q - log p:

    KL(p || q) = sum_v p_v (log p_v - log q_v)          H(p) = -sum_v p_v log p_v
    mu_beta    = p^(1-beta) q^beta / Z = p exp(beta r - A(beta)),   A(beta) = log sum_v p_v exp(beta r_v)
    KL(mu_beta || p) = beta E_mu[r] - A(beta),          d KL(mu_beta || p) / d beta = beta Var_mu[r] >= 0

Half-precision input is computed in float32 and float64 input in float64. Nothing else is made float64, so
that devices without it work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = [
    "entropy",
    "geometric_blend",
    "kl",
    "noncentral_chi2",
    "tempered",
    "truncated_geometric",
    "trust_region",
    "trust_region_blend",
]

# Rows are solved in blocks of about this many numbers. On a CPU a block and its temporaries stay in the cache
# through all of its iterations; on an accelerator a block only bounds the memory.
_BLOCK_CPU = 2**20
_BLOCK_ACCELERATOR = 2**26
# After this many Newton steps a row's bracket is only halved, so that nothing can keep it from converging.
_NEWTON_STEPS = 12


def kl(log_p: Float[Tensor, "*p_batch outcomes"], log_q: Float[Tensor, "*q_batch _"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats over the last axis; `kl(log_q, log_p)` is the other direction.

    Batch dimensions broadcast. Where p has mass that q lacks, the row is +inf and its gradient 0; elsewhere
    value and gradient are finite. Float32 or better. Raises `TrimtabError` when the shapes do not fit.
    """
    log_p, log_q = _alike(log_p, log_q)
    outside = log_p == -torch.inf
    lacking = (log_q == -torch.inf) & ~outside
    # Masked before the product and not after it: 0 * inf is nan, in the value and in the gradient.
    ignored = outside | lacking
    log_ratio = torch.where(ignored, 0.0, log_p - log_q)
    divergence = (torch.where(ignored, 0.0, log_p.exp()) * log_ratio).sum(-1)
    return torch.where(lacking.any(-1), torch.inf, divergence)


def entropy(log_p: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch"]:
    """H(p) in nats over the last axis, in float32 or better; outcomes without probability add nothing."""
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return -(log_p.exp() * finite).sum(-1)


def geometric_blend(
    log_p: Float[Tensor, "*p_batch outcomes"],
    log_q: Float[Tensor, "*q_batch _"],
    beta: float | int | Tensor,
) -> Float[Tensor, "*batch outcomes"]:
    """Log-probabilities of mu_beta = p^(1-beta) q^beta / Z; differentiable in all three arguments.

    `beta` in [0, 1] is one number, or one per row of the broadcast batch. beta = 0 is p; at every other
    beta mu lives where both p and q do, so that beta = 1 is q restricted to the support of p. Float32 or
    better.

    Raises `TrimtabError` when the shapes do not fit, when a beta is outside [0, 1], and when beta > 0 in a
    row whose two supports have nothing in common.
    """
    log_p, log_q = _alike(log_p, log_q)
    beta = torch.as_tensor(beta, dtype=log_p.dtype, device=log_p.device)
    accepted = (beta >= 0) & (beta <= 1)
    if not bool(accepted.all()):
        raise TrimtabError(f"beta={float(beta[~accepted][0])} must lie in [0, 1].")
    batch = torch.broadcast_shapes(log_p.shape[:-1], log_q.shape[:-1])
    beta = _per_row("beta", beta, batch).unsqueeze(-1)
    outside = (log_p == -torch.inf) | (log_q == -torch.inf)
    if bool((outside.all(-1, keepdim=True) & (beta > 0)).any()):
        raise TrimtabError("log_p and log_q have no outcome in common in some row: beta must be 0 there.")
    log_ratio = torch.where(outside, 0.0, log_q - log_p)
    tilted = torch.where(outside & (beta > 0), -torch.inf, log_p + beta * log_ratio)
    return tilted - tilted.logsumexp(-1, keepdim=True)


@torch.no_grad()
def trust_region_blend(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*teacher_batch _"],
    epsilon: float | int | Tensor,
    *,
    temperature: float | int = 1.0,
) -> tuple[Float[Tensor, "*batch vocab"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The distribution nearest to the teacher within `epsilon` nats of the student: `(log_mu, beta, kl)`.

    mu = argmin KL(mu || q) subject to KL(mu || p) <= epsilon, with p (student) and q (teacher) the softmax
    of logits / temperature. It is mu_beta with the largest beta in [0, 1] whose `kl` = KL(mu_beta || p) is
    at most epsilon.

    - `student_logits`, `teacher_logits`: of one shape; -inf masks a token.
    - `epsilon`: >= 0, one number or one per row. 0 gives the student's log-softmax bit for bit, inf the
      teacher's.
    - Where the teacher masks tokens that the student does not, KL jumps by -log(p's mass on q's support) as
      soon as beta > 0: a row whose epsilon is below that stays with the student (beta 0).
    - Where the student masks tokens that the teacher does not, beta = 1 is q restricted to p's support.
    - `kl` is never above epsilon but for rounding; where 0 < beta < 1 it is below epsilon by at most
      2.5e-5 epsilon + 5e-7 and rounding in float32 (4e-11 epsilon + 9e-16 in float64).

    Float32 or better inside and in all three results, which carry no gradient (`geometric_blend` with the
    returned beta has one). Raises `TrimtabError` for shapes that differ, an epsilon that is negative or
    NaN, a temperature that is not positive and finite, and a row of logits with NaN, +inf or no finite
    value.
    """
    _check_blend(student_logits, teacher_logits, temperature)
    batch, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    student, teacher = student_logits.reshape(-1, vocab), teacher_logits.reshape(-1, vocab)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    radius = torch.as_tensor(epsilon, dtype=dtype, device=student.device)
    radius = _per_row("epsilon", radius, batch).reshape(-1)
    if not bool((radius >= 0).all()):
        raise TrimtabError(f"epsilon={float(radius[~(radius >= 0)][0])} must be 0 or more (nats per row).")

    log_mu = student.new_empty(student.shape, dtype=dtype)
    beta, divergence = torch.zeros_like(radius), torch.zeros_like(radius)
    for rows in _blocks(student):
        log_p = torch.log_softmax(tempered(student[rows], temperature, dtype), -1)
        scores = tempered(teacher[rows], temperature, dtype)
        # log_softmax spreads a bad value over its whole row.
        _refuse("student_logits", student[rows], log_p[:, 0].isnan(), rows.start)
        _refuse("teacher_logits", teacher[rows], ~scores.amax(-1).isfinite(), rows.start)
        log_mu[rows], beta[rows], divergence[rows] = _blend_inside(log_p, scores, radius[rows])
    return log_mu.reshape(*batch, vocab), beta.reshape(batch), divergence.reshape(batch)


@torch.no_grad()
def trust_region(
    log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"], epsilon: float | int
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """`trust_region_blend` of few rows that are normalised already: nothing is checked, nor done in blocks.

    `log_p` float32 or better. A row of which log_softmax made NaN has a NaN divergence.
    """
    radius = torch.full_like(log_p[:, 0], epsilon)
    log_mu, beta, divergence = _blend_inside(log_p, log_q.to(log_p.dtype), radius)
    bad = log_p[:, 0].isnan() | log_q[:, 0].isnan()  # log_softmax has spread it over the row
    return log_mu, beta, divergence.masked_fill(bad, torch.nan)


def tempered(
    logits: Float[Tensor, "*batch vocab"], temperature: float | int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch vocab"]:
    """logits / temperature in `dtype` or better; the logits themselves when that changes nothing."""
    logits = logits.to(torch.promote_types(logits.dtype, dtype))
    return logits if temperature == 1 else logits / temperature


def truncated_geometric(rate: float | int, n: int, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n"]:
    """Log-probabilities over 1..n: rate (1-rate)^(i-1) for i < n, and the tail's mass (1-rate)^(n-1) for n.

    PALBERT's prior over exit layers and VARAN's "geometric"; flipped, VARAN's
    "geometric_reversed". `rate` lies in (0, 1], where 1 puts all mass on the first; `n` >= 1. Raises
    `TrimtabError` for others.
    """
    if not 0 < rate <= 1:
        raise TrimtabError(f"rate={rate} must lie in (0, 1].")
    _check_count(n)
    stay = math.log1p(-rate) if rate < 1 else -math.inf
    survival = [0.0, *(i * stay for i in range(1, n))]  # 0 * -inf would be nan
    return torch.tensor([math.log(rate) + s for s in survival[:-1]] + survival[-1:], dtype=dtype)


def noncentral_chi2(
    df: float | int, n: int, *, noncentrality: float | int = 10.0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n"]:
    """Log-probabilities over 1..n of a discretised non-central chi-squared density (VARAN's prior).

    x_1..x_n are equally spaced from the 1 % to the 99 % quantile, both included, p_l = pdf(x_l) step, and
    what is missing from 1 goes to p_1. Flipped, it is VARAN's default "chi2_reversed".

    `df` > 0, `noncentrality` > 0 and `n` >= 1. Raises `TrimtabError` for others.
    """
    from scipy.stats import ncx2

    for name, value in (("df", df), ("noncentrality", noncentrality)):
        if not (math.isfinite(value) and value > 0):
            raise TrimtabError(f"{name}={value} must be positive and finite.")
    _check_count(n)
    low, high = (float(ncx2.ppf(quantile, df, noncentrality)) for quantile in (0.01, 0.99))
    step = (high - low) / max(n - 1, 1)
    rest = [float(ncx2.pdf(low + i * step, df, noncentrality)) * step for i in range(1, n)]
    # The density has one mode, so that `rest` is 0.99 at most (at n = 3, near a normal density).
    return torch.tensor([math.log(p) for p in (1 - sum(rest), *rest)], dtype=dtype)


def _check_blend(student_logits: Tensor, teacher_logits: Tensor, temperature: float | int) -> None:
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise TrimtabError(f"student_logits and teacher_logits have shapes {shapes}: they must be equal.")
    if student_logits.shape[-1] == 0:
        raise TrimtabError(f"student_logits has shape {list(student_logits.shape)}: the last axis is empty.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise TrimtabError(f"temperature={temperature} must be positive and finite.")


def _blend_inside(
    log_p: Float[Tensor, "rows vocab"], scores: Float[Tensor, "rows vocab"], radius: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """log mu, beta and KL(mu || p); rows of radius 0 are the student's."""
    inside = radius > 0
    if bool(inside.all()):
        return _blend_rows(log_p, scores, radius)
    log_mu, beta, divergence = log_p.clone(), torch.zeros_like(radius), torch.zeros_like(radius)
    if bool(inside.any()):
        log_mu[inside], beta[inside], divergence[inside] = _blend_rows(log_p[inside], scores[inside], radius[inside])
    return log_mu, beta, divergence


def _blend_rows(
    log_p: Float[Tensor, "rows vocab"], scores: Float[Tensor, "rows vocab"], radius: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """log mu, beta and KL(mu || p) for positive radii; `scores` is log q up to a constant per row."""
    log_ratio = (scores - scores.amax(-1, keepdim=True)).sub_(log_p)
    # A sum shows what is not finite without a second [rows, vocab], which a comparison would need.
    base, masked = log_p, not bool(log_ratio.sum(-1).isfinite().all())
    lacking = torch.zeros_like(radius, dtype=torch.bool)
    if masked:
        # What the student masks has no part in base, whatever r is there; what the teacher alone masks is taken out.
        log_ratio.nan_to_num_(0.0, 0.0, -torch.inf)
        lacking = log_ratio.amin(-1) == -torch.inf
        if bool(lacking.any()):
            outside = log_ratio == -torch.inf
            base = log_p.masked_fill(outside, -torch.inf)
            log_ratio.masked_fill_(outside, 0.0)
    log_z, mean, _ = _moments(base, log_ratio, torch.ones_like(radius))
    # From here on log_ratio is log q - log p with its constant, so that A is nearly 0 at both ends and
    # small in between: little is lost in beta E[r] - A.
    log_ratio.sub_(log_z.unsqueeze(-1))
    log_mass, _, variance = _moments(base, log_ratio, torch.zeros_like(radius))
    # A float32 softmax sums to 1 only up to rounding (1e-5 in a large vocabulary): the KL is to p / sum(p).
    log_total = log_mass if base is log_p else torch.where(lacking, log_p.exp().sum(-1).log(), log_mass)
    jump = log_total - log_mass
    divergence = mean - log_z + log_total
    # A row without a common token is nan throughout, so neither whole nor between: it stays with the student.
    whole, between = divergence <= radius, (divergence > radius) & (jump <= radius)
    beta, log_z = whole.to(radius.dtype), torch.zeros_like(radius)
    divergence = torch.where(whole, divergence, 0.0)
    if bool(between.any()):
        known = torch.stack([radius, log_total, jump, variance], -1)
        solution = _solve(_keep(base, between), _keep(log_ratio, between), _keep(known, between))
        beta[between], log_z[between], divergence[between] = solution.unbind(-1)
    log_mu = torch.addcmul(base, beta.unsqueeze(-1), log_ratio).sub_(log_z.unsqueeze(-1))
    student = beta == 0
    scores = scores[whole]
    if masked:
        scores = scores.masked_fill(base[whole] == -torch.inf, -torch.inf)
    log_mu[student], log_mu[whole] = log_p[student], scores.log_softmax(-1)
    return log_mu, beta, divergence


def _solve(
    base: Float[Tensor, "rows vocab"], log_ratio: Float[Tensor, "rows vocab"], known: Float[Tensor, "rows 4"]
) -> Float[Tensor, "rows 3"]:
    """beta, A(beta) and KL where KL(mu_beta || p) meets the radius, from below.

    `known` holds each row's radius, log sum(p), jump and Var_p[r].

    Newton's method on sqrt(KL - jump), which is nearly linear in beta (KL is about jump + beta^2 Var / 2),
    in a bracket of a feasible `low` and an infeasible `high`; a step out of the bracket becomes its
    midpoint. A row is done when KL is within `slack` below the radius or its bracket is down to rounding,
    and the others go on alone.
    """
    rounding = torch.finfo(base.dtype).eps
    answer = torch.zeros_like(known[:, :3])
    index = torch.arange(len(base), device=base.device)
    low, high = torch.zeros_like(answer), torch.ones_like(known[:, 0])
    radius, _, jump, variance = known.unbind(-1)
    beta = (2 * (radius - jump) / variance).sqrt()
    for step in range(_NEWTON_STEPS + math.ceil(-math.log2(rounding))):
        radius, log_total, jump, _ = known.unbind(-1)
        slack = radius * rounding ** (2 / 3) + 4 * rounding
        # Written so that a nan, too, becomes the midpoint.
        beta = torch.where((beta > low[:, 0]) & (beta < high), beta, (low[:, 0] + high) / 2)
        log_z, mean, variance = _moments(base, log_ratio, beta)
        divergence = beta * mean - log_z + log_total
        feasible = divergence <= radius
        low = torch.where(feasible.unsqueeze(-1), torch.stack([beta, log_z, divergence], -1), low)
        high = torch.where(feasible, high, beta)
        answer[index] = low
        going = ~(feasible & (radius - divergence <= slack)) & (high - low[:, 0] > 4 * rounding)
        if not bool(going.any()):
            break
        # The middle of the slack is aimed at, so that the last step most likely ends on the feasible side.
        root, target = (divergence - jump).sqrt(), (radius - slack / 2 - jump).sqrt()
        beta = beta + 2 * root * (target - root) / (beta * variance)
        if step >= _NEWTON_STEPS:
            beta = torch.full_like(beta, torch.nan)
        base, log_ratio, known = (_keep(x, going) for x in (base, log_ratio, known))
        index, beta, low, high = (_keep(x, going) for x in (index, beta, low, high))
    return answer


def _moments(
    base: Float[Tensor, "rows vocab"], log_ratio: Float[Tensor, "rows vocab"], beta: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A(beta), E_mu[r] and Var_mu[r] with one [rows, vocab] temporary."""
    weight = torch.addcmul(base, beta.unsqueeze(-1), log_ratio)
    peak = weight.amax(-1, keepdim=True)
    weight.sub_(peak).exp_()
    mass = weight.sum(-1)
    mean = weight.mul_(log_ratio).sum(-1) / mass
    variance = weight.mul_(log_ratio).sum(-1) / mass - mean * mean
    return peak.squeeze(-1) + mass.log(), mean, variance


def _keep(rows: Tensor, mask: Bool[Tensor, " rows"]) -> Tensor:
    """`rows[mask]`, without a copy when that is all of them."""
    return rows if bool(mask.all()) else rows[mask]


def _blocks(rows: Float[Tensor, "rows vocab"]) -> Iterator[slice]:
    size = max(1, (_BLOCK_CPU if rows.device.type == "cpu" else _BLOCK_ACCELERATOR) // rows.shape[-1])
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _refuse(name: str, logits: Float[Tensor, "rows vocab"], bad: Bool[Tensor, " rows"], start: int) -> None:
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    values = logits[row]
    infinite = "+inf" if bool((values == torch.inf).any()) else "no finite value"
    found = "NaN" if bool(values.isnan().any()) else infinite
    raise TrimtabError(f"{name} has {found} in row {start + row}: a row needs a finite logit, and may have -inf.")


def _alike(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 or better."""
    pairs = zip(reversed(log_p.shape[:-1]), reversed(log_q.shape[:-1]), strict=False)
    if log_p.shape[-1] != log_q.shape[-1] or any(a != b and 1 not in (a, b) for a, b in pairs):
        shapes = f"{list(log_p.shape)} and {list(log_q.shape)}"
        raise TrimtabError(f"log_p and log_q have shapes {shapes}: last axes must be equal, others broadcast.")
    dtype = torch.promote_types(torch.promote_types(log_p.dtype, log_q.dtype), torch.float32)
    return log_p.to(dtype), log_q.to(dtype)


def _per_row(name: str, value: Tensor, batch: torch.Size) -> Tensor:
    if value.ndim and value.shape != batch:
        raise TrimtabError(f"{name} has shape {list(value.shape)}: one number, or the batch's {list(batch)}.")
    return value.expand(batch)


def _check_count(n: int) -> None:
    if n < 1:
        raise TrimtabError(f"n={n} must be at least 1.")
