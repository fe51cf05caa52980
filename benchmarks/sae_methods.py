"""HierarchicalTopK and KronSAE beside TopK: a training step, the loss alone, the encoder alone.

    step       F = 16,384, K = 64, d = 640, batch 2,048: our step on every prefix beside our step on the reconstruction
    loss       tokens 256, K = 128, d = 512, F = 4,096: forward and backward beside [tokens, K, d] through autograd
    encoder    F = 65,536, K = 50, d = 768, batch 64: KronSAE's two-stage TopK beside product and TopK of a dense one;
               its memory at batch 2,048, beside a [tokens, F] tensor
    training   F = 65,536, K = 50, d = 768, batch 2,048: whole steps, optimiser included, of a (4, 4) KronSAE beside
               those of a dense dictionary

Memory is the peak over what the process held before the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row, Target, Times, in_turns, print_table, write_rows
from trimtab.sae import DictionaryConfig, TrainingConfig, kernels
from trimtab.sae.functional import Weights, loss_and_gradients
from trimtab.sae.kron import KronEncoding
from trimtab.sae.learner import Learner
from trimtab.sae.objectives import Hierarchical, hierarchical_topk_loss, hierarchical_weights
from trimtab.sae.prefixes import prefix_loss_reference

__all__ = ["main", "peak_bytes"]

SHAPES: dict[tuple[int, int], float | None] = {(4, 4): 1 / 1.8, (4, 8): None, (8, 8): 1 / 3.4}
"""m and n, and the share of the dense encoder's time that is to be reached."""
F, K, D_MODEL = 65_536, 50, 768


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    rows = [*_step(), *_loss(), *_encoder(), _training()]
    print_table("HierarchicalTopK and KronSAE", rows)
    write_rows("sae_methods", rows)


def peak_bytes(function: Callable[[], object]) -> int:
    """The largest memory during a call, over that before it; what was freed earlier is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    function()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _step() -> list[Row]:
    decoder = torch.nn.functional.normalize(_random(16_384, 640), dim=-1)
    weights = Weights(decoder.clone(), torch.zeros(16_384), decoder, torch.zeros(640))
    gradients = Weights(*(torch.zeros_like(weight) for weight in weights))
    x = _random(2_048, 640, seed=1)

    def hierarchical() -> object:
        return loss_and_gradients(x, x, weights, gradients, k=64, variance=640.0, objective=Hierarchical())

    def topk() -> object:
        return loss_and_gradients(x, x, weights, gradients, k=64, variance=640.0)

    times = in_turns({"hierarchical": hierarchical, "topk": topk}, 7)
    held = sum(tensor.nbytes for tensor in (*weights, *gradients)) * 2  # with Adam's two moments
    return [
        _time("hierarchical step beside TopK's", times, "hierarchical", "topk", Target("ratio", "<=", 1.25)),
        _space(
            "memory of training, hierarchical beside TopK",
            held + peak_bytes(hierarchical),
            held + peak_bytes(topk),
            Target("ratio", "<=", 1.1),
        ),
    ]


def _loss() -> list[Row]:
    values = _random(256, 128).abs().sort(descending=True).values.requires_grad_()
    indices = torch.randint(4_096, (256, 128), generator=torch.Generator().manual_seed(2))
    decoder, bias = _random(4_096, 512, seed=3).requires_grad_(), torch.zeros(512, requires_grad=True)
    target, prefixes = _random(256, 512, seed=4), hierarchical_weights(128).float()

    def ours() -> None:
        hierarchical_topk_loss(values, indices, decoder, bias, target, assume_sorted=True)[0].backward()

    def naive() -> None:
        prefix_loss_reference(values, indices, decoder, bias, target, prefixes).backward()

    times = in_turns({"ours": ours, "naive": naive}, 15)
    return [
        _time("hierarchical loss beside naive autograd", times, "ours", "naive", Target("ratio", "<=", 1 / 3)),
        _space("memory of the loss beside naive", peak_bytes(ours), peak_bytes(naive), Target("ratio", "<=", 1 / 8)),
    ]


def _encoder() -> list[Row]:
    x, dense = _random(64, D_MODEL), _random(F, D_MODEL, seed=1)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: kernels.top_products(x, dense, torch.zeros(F), K)}
    for m, n in SHAPES:
        shape = KronEncoding(h=F // (m * n), m=m, n=n)
        weight, bias = _random(shape.rows, D_MODEL, seed=2), torch.zeros(shape.rows)
        calls[f"({m}, {n})"] = lambda shape=shape, weight=weight, bias=bias: shape.top(x, weight, bias, K)
    times = in_turns(calls, 15)
    targets = [None if share is None else Target("ratio", "<=", share) for share in SHAPES.values()]
    rows = [
        _time(f"Kron encoder {name} beside a dense one", times, name, "dense", target)
        for name, target in zip(list(calls)[1:], targets, strict=True)
    ]
    shape, many = KronEncoding(h=F // 16, m=4, n=4), _random(2_048, D_MODEL, seed=3)
    weight, bias = _random(shape.rows, D_MODEL, seed=2), torch.zeros(shape.rows)
    peak = peak_bytes(lambda: shape.top(many, weight, bias, K))
    return [
        *rows,
        _space("memory of the Kron encoder beside [tokens, F]", peak, 4 * 2_048 * F, Target("ratio", "<=", 0.5)),
    ]


def _training() -> Row:
    x = _random(2_048, D_MODEL)
    settings = TrainingConfig(tokens=10**9, batch_size=2_048)  # so that no latent counts as dead, and AuxK rests

    def stepping(kron: tuple[int, int] | None) -> Callable[[], object]:
        dictionary = DictionaryConfig(place="x", n_latents=F, k=K, kron=kron)
        learner = Learner.begin(dictionary, settings, {"x": x}, x.device)
        return lambda: learner.step({"x": x}, 1e-3, 0)

    times = in_turns({"kron": stepping((4, 4)), "dense": stepping(None)}, 5)
    return _time("Kron training step (4, 4) beside TopK's", times, "kron", "dense", Target("ratio", "<=", 1 / 1.5))


def _time(name: str, times: dict[str, Times], ours: str, peer: str, target: Target | None) -> Row:
    mine, other = times[ours], times[peer]
    return Row(
        name=name,
        unit="ms",
        ours=1e3 * mine.wall_median,
        peer=1e3 * other.wall_median,
        target=target,
        repeats=len(mine.wall),
        cpu_seconds=sum(mine.cpu + other.cpu),
        wall_seconds=sum(mine.wall + other.wall),
    )


def _space(name: str, ours: int, peer: int, target: Target) -> Row:
    return Row(
        name=name,
        unit="MiB",
        ours=ours / 2**20,
        peer=peer / 2**20,
        target=target,
        repeats=1,
        cpu_seconds=0.0,
        wall_seconds=0.0,
    )


if __name__ == "__main__":
    main()
