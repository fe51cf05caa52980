"""The trust-region solve on a large vocabulary: `trust_region_blend` beside 25 plain bisections.

151,936 tokens (Qwen's vocabulary), 64 rows, float32, two threads. Both find for each row the largest beta at which
KL(mu_beta || p) <= epsilon, and give log mu; bisection is what a few lines of PyTorch do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import Row, Target, in_turns, print_table, write_rows
from trimtab.core.simplex import trust_region_blend

__all__ = ["bisect", "logits", "main"]

VOCABULARY = 151_936
ROWS = 64
EPSILON = 0.1
BISECTIONS = 25
REPEATS = 5


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    student, teacher = logits(ROWS, VOCABULARY)
    times = in_turns(
        {
            "ours": lambda: trust_region_blend(student, teacher, EPSILON),
            "peer": lambda: bisect(student, teacher, EPSILON, BISECTIONS),
        },
        REPEATS,
    )
    _, beta, divergence = trust_region_blend(student, teacher, EPSILON)
    _, other = bisect(student, teacher, EPSILON, BISECTIONS)
    rows = [
        Row(
            name="trust-region solves, V = 151,936",
            unit="rows/s",
            ours=ROWS / times["ours"].wall_median,
            peer=ROWS / times["peer"].wall_median,
            peer_version=f"{BISECTIONS} bisections, torch {torch.__version__}",
            target=Target("ratio", ">=", 4.0),
            repeats=REPEATS,
            cpu_seconds=sum(times["ours"].cpu) + sum(times["peer"].cpu),
            wall_seconds=sum(times["ours"].wall) + sum(times["peer"].wall),
        ),
    ]
    print_table("Trust region", rows)
    print(
        f"beta {beta.min():.3f} to {beta.max():.3f}; largest difference of the two {(beta - other).abs().max():.1e}; "
        f"KL {divergence.min():.6f} to {divergence.max():.6f} for epsilon = {EPSILON}\n"
    )
    write_rows("trust_region", rows)


def logits(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's: random, peaked, and related as those of two models of one text are."""
    generator = torch.Generator().manual_seed(0)
    shared, own, other = (torch.randn(rows, vocabulary, generator=generator) for _ in range(3))
    return 2.5 * shared + own, 2.5 * shared + other


def bisect(student: Tensor, teacher: Tensor, epsilon: float, bisections: int) -> tuple[Tensor, Tensor]:
    """log mu and beta, by halving the bracket of beta in [0, 1] so many times."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    low, high = student.new_zeros(len(student), 1), student.new_ones(len(student), 1)
    for _ in range(bisections):
        beta = (low + high) / 2
        log_mu = ((1 - beta) * log_p + beta * log_q).log_softmax(-1)
        feasible = (log_mu.exp() * (log_mu - log_p)).sum(-1, keepdim=True) <= epsilon
        low, high = torch.where(feasible, beta, low), torch.where(feasible, high, beta)
    return ((1 - low) * log_p + low * log_q).log_softmax(-1), low[:, 0]


if __name__ == "__main__":
    main()
