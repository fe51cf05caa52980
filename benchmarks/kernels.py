"""The four products of `trimtab.sae.kernels`, beside the same in dense PyTorch.

A batch of 2,048 tokens, d = 640, F = 16,384, k = 32, float32, two threads. No targets:
these say where a training step's time goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Row, Times, in_turns, print_table, write_rows
from trimtab.sae import kernels

__all__ = ["main", "products"]

TOKENS, D_MODEL, N_LATENTS, K = 2_048, 640, 16_384, 32
REPEATS = 5


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    rows = []
    for name, (ours, dense) in products(TOKENS, D_MODEL, N_LATENTS, K).items():
        times = in_turns({"ours": ours, "peer": dense}, REPEATS)
        rows.append(_row(name, times["ours"], times["peer"]))
    print_table("Products of a step, F = 16,384, k = 32, d = 640, batch 2,048", rows)
    write_rows("kernels", rows)


def products(
    tokens: int, d_model: int, n_latents: int, k: int
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each product, ours and dense, as functions that give the same values (of top_products: the values, unsorted)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_model, generator=generator)
    weight = torch.randn(n_latents, d_model, generator=generator) / d_model**0.5
    bias = torch.randn(n_latents, generator=generator) / 10
    values, indices = kernels.top_products(x, weight, bias, k)
    gradient = torch.empty_like(weight)

    def dense_latents() -> Tensor:
        return torch.zeros(tokens, n_latents).scatter(-1, indices, values)

    return {
        "top_products": (
            lambda: kernels.top_products(x, weight, bias, k)[0],
            lambda: torch.addmm(bias, x, weight.T).topk(k, dim=-1, sorted=False).values,
        ),
        "top_products, screened": (
            lambda: kernels.top_products(x, weight, bias, k, precision="screened")[0],
            lambda: torch.addmm(bias, x, weight.T).topk(k, dim=-1, sorted=False).values,
        ),
        "row_products": (lambda: kernels.row_products(x, weight, indices), lambda: (x @ weight.T).gather(-1, indices)),
        "mix_rows": (lambda: kernels.mix_rows(values, indices, weight), lambda: dense_latents() @ weight),
        "add_outer": (lambda: kernels.add_outer(values, indices, x, gradient), lambda: dense_latents().T @ x),
    }


def _row(name: str, ours: Times, dense: Times) -> Row:
    return Row(
        name=name,
        unit="calls/s",
        ours=1 / ours.wall_median,
        peer=1 / dense.wall_median,
        peer_version=f"dense, torch {torch.__version__}",
        repeats=REPEATS,
        cpu_seconds=sum(ours.cpu) + sum(dense.cpu),
        wall_seconds=sum(ours.wall) + sum(dense.wall),
    )


if __name__ == "__main__":
    main()
