"""The Triton kernels on a CUDA device, beside `torch.compile` of the plain formulas and beside our PyTorch forms.

F = 65,536, d = 2,304, float32, K = 32, 64, 128, and 8,192 tokens or the half, quarter … for which the plain formula's
[tokens, K, d] tensors fit:

    step    what our trainer does from the latents on: loss and all gradients, into memory that is kept;
            HierarchicalTopK with every prefix beside TopK
    loss    forward and backward through autograd: ours beside the plain formula, compiled, and beside our PyTorch form
    top     the K largest of 65,536 entries in each of 256 rows, beside `torch.topk`
    train   whole training steps, K = 64, the products in bfloat16, a quarter of the latents dead and AuxK on, beside
            sparsify's coder as its trainer steps it, both with fused Adam

Times are those of one call, the device waited for; memory is the peak over what was held before the call. Run only when
named; without a CUDA device it says so and fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.measure import Row, Target, Times, in_turns, print_table, write_rows
from trimtab.sae import DictionaryConfig, TrainingConfig, kernels
from trimtab.sae.encodings import Latents
from trimtab.sae.functional import sparse_decode
from trimtab.sae.learner import Learner
from trimtab.sae.objectives import RECONSTRUCTION, Hierarchical, Objective, hierarchical_weights
from trimtab.sae.prefixes import prefix_loss, prefix_loss_reference

__all__ = ["case", "losses", "main", "steps", "training_steps"]

TOKENS, D_MODEL, N_LATENTS = 8_192, 2_304, 65_536
OVER_TOPK = {32: 1.20, 64: 1.26, 128: 1.33}
"""By K, what a hierarchical step may cost of a TopK one: the published ratios of fused kernels."""
OVER_COMPILED = {32: 1.9, 64: 2.9, 128: 4.1}
"""By K, how many times faster than the plain formula, compiled, the fused loss is to be: the published ratios."""
CALLS, REPEATS = 10, 5

Call = Callable[[], object]


def main() -> None:
    """Measure, print the table, and write the rows."""
    if not (torch.cuda.is_available() and kernels.HAS_TRITON):
        sys.exit("benchmarks.gpu measures Triton kernels: it needs a CUDA device and the package triton")
    rows = [row for k in OVER_TOPK for row in (*_objectives(k), *_top(k))] + _training()
    print_table(f"F = 65,536, d = 2,304, float32, on {torch.cuda.get_device_name()}", rows)
    write_rows("gpu", rows)


# -- what is measured ------------------------------------------------------------------------------


def case(tokens: int, d: int, n_latents: int, k: int, device: str) -> list[Tensor]:
    """Values in falling order, indices, decoder, bias and target."""
    g = torch.Generator(device).manual_seed(0)
    values = torch.rand(tokens, k, generator=g, device=device).sort(descending=True).values
    indices = torch.randint(n_latents, (tokens, k), generator=g, device=device)
    shapes = ((n_latents, d), (d,), (tokens, d))
    return [values, indices, *(torch.randn(shape, generator=g, device=device) for shape in shapes)]


def steps(tensors: list[Tensor]) -> dict[str, Call]:
    """One step of each objective from the latents on; it returns loss and gradients."""
    values, indices, decoder, bias, target = tensors
    gradient = torch.empty_like(decoder)

    def step(objective: Objective) -> Call:
        latents, k = Latents(values, indices), values.shape[1]
        return lambda: objective.loss_and_gradients(latents, decoder, bias, target, 1.0, gradient, k=k)

    return {"hierarchical": step(Hierarchical()), "topk": step(RECONSTRUCTION)}


def losses(
    tensors: list[Tensor], compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> dict[str, Call]:
    """Each loss with its gradients, through autograd: ours, and its plain formula given to `compiled`."""
    k = tensors[0].shape[1]
    prefixes = hierarchical_weights(k).float().to(tensors[0].device)

    def ours_hierarchical(*leaves: Tensor) -> Tensor:
        return prefix_loss(*leaves, prefixes)[0]

    def ours_topk(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return (sparse_decode(Latents(values, indices), decoder, bias) - target).square().mean()

    def plain_hierarchical(*leaves: Tensor) -> Tensor:
        return prefix_loss_reference(*leaves, prefixes)

    def plain_topk(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return ((values[..., None] * decoder[indices]).sum(1) + bias - target).square().mean()

    def with_gradients(loss: Callable[..., Tensor]) -> Call:
        values, indices, decoder, bias, target = tensors
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (values, bias)]
        wanted = [leaves[0], decoder.detach().requires_grad_(), leaves[1]]

        def call() -> list[Tensor]:
            found = loss(wanted[0], indices, wanted[1], wanted[2], target)
            return [found.detach(), *torch.autograd.grad(found, wanted)]

        return call

    return {
        "hierarchical": with_gradients(ours_hierarchical),
        "topk": with_gradients(ours_topk),
        "plain hierarchical": with_gradients(compiled(plain_hierarchical)),
        "plain topk": with_gradients(compiled(plain_topk)),
    }


def training_steps(tokens: int, d: int, n_latents: int, k: int, device: str) -> dict[str, Call]:
    """A step of our trainer and one of sparsify's, each on its own dictionary of the same size."""
    from sparsify import SparseCoder, SparseCoderConfig

    x = torch.randn(tokens, d, generator=torch.Generator(device).manual_seed(0), device=device)
    dead = torch.arange(n_latents, device=device) < n_latents // 4
    settings = TrainingConfig(
        tokens=10**9, batch_size=tokens, precision="bfloat16", k_aux=d // 2, aux_share=1.0, dead_after=10**6
    )
    learner = Learner.begin(DictionaryConfig(place="x", n_latents=n_latents, k=k), settings, {"x": x}, x.device)
    coder = SparseCoder(d, SparseCoderConfig(num_latents=n_latents, k=k), device=device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def ours() -> None:
        learner.silent_tokens.copy_(dead * 10**6)
        learner.step({"x": x}, 1e-4, 0)

    def sparsify() -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(x.device.type, torch.bfloat16):
            out = coder(x, dead_mask=dead)
            (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return {"training": ours, "sparsify": sparsify}


def _training() -> list[Row]:
    calls = training_steps(TOKENS, D_MODEL, N_LATENTS, 64, "cuda")
    times = in_turns({name: _waited_for(call) for name, call in calls.items()}, REPEATS)
    peaks = {name: _peak_bytes(call) for name, call in calls.items()}
    version = f"eai-sparsify {importlib.metadata.version('eai-sparsify')}"
    return _pair("K = 64, bf16", times, peaks, "training", "sparsify", version, Target("ratio", "<=", 1 / 1.3))


def _objectives(k: int) -> list[Row]:
    torch.cuda.empty_cache()
    torch.compiler.reset()
    tokens = TOKENS
    # Three such tensors and the dictionary's gradients: what the plain formula holds at once, uncompiled.
    while 3 * 4 * tokens * k * D_MODEL + 8 * N_LATENTS * D_MODEL > torch.cuda.mem_get_info()[0]:
        tokens //= 2
    tensors = case(tokens, D_MODEL, N_LATENTS, k, "cuda")
    named = f"K = {k}" + ("" if tokens == TOKENS else f", {tokens:,} tokens")
    stepping, ours = steps(tensors), losses(tensors, functools.partial(torch.compile, dynamic=False))
    blocked = {f"blocked {name}": _without_triton(call) for name, call in ours.items() if not name.startswith("plain")}
    calls = {f"{name} step": call for name, call in stepping.items()} | ours | blocked
    times = in_turns({name: _waited_for(call) for name, call in calls.items()}, REPEATS)
    peaks = {name: _peak_bytes(call) for name, call in calls.items()}
    compiled = f"torch.compile, torch {torch.__version__}"
    pairs: list[tuple[str, str, str | None, Target | None]] = [
        ("hierarchical step", "topk step", None, Target("ratio", "<=", OVER_TOPK[k])),
        ("hierarchical", "plain hierarchical", compiled, Target("ratio", "<=", 1 / OVER_COMPILED[k])),
        ("topk", "plain topk", compiled, None),
        ("hierarchical", "blocked hierarchical", None, None),
        ("topk", "blocked topk", None, None),
    ]
    return [row for pair in pairs for row in _pair(named, times, peaks, *pair)]


def _top(k: int) -> list[Row]:
    product = torch.randn(256, N_LATENTS, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        entries = product.to(dtype)
        calls: dict[str, Call] = {
            "top_columns": lambda entries=entries: kernels.triton_forms(entries).top_columns(entries, k),
            "torch.topk": lambda entries=entries: entries.topk(k, sorted=False),
        }
        times = in_turns({name: _waited_for(call) for name, call in calls.items()}, REPEATS)
        peaks = {name: _peak_bytes(call) for name, call in calls.items()}
        rows += _pair(
            f"K = {k}, {str(dtype).removeprefix('torch.')}", times, peaks, "top_columns", "torch.topk", None, None
        )
    return rows


# -- how -------------------------------------------------------------------------------------------


def _waited_for(call: Call) -> Call:
    def calls() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return calls


def _without_triton(call: Call) -> Call:
    def plain() -> object:
        with _no_triton():
            return call()

    return plain


@contextlib.contextmanager
def _no_triton() -> Iterator[None]:
    kernels.HAS_TRITON = False
    try:
        yield
    finally:
        kernels.HAS_TRITON = True


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _pair(
    named: str,
    times: Mapping[str, Times],
    peaks: Mapping[str, int],
    ours: str,
    peer: str,
    version: str | None,
    target: Target | None,
) -> list[Row]:
    """A row of times and one of memory."""
    mine, other = times[ours], times[peer]
    name = f"{ours} beside {peer}, {named}"
    time = Row(
        name=name,
        unit="ms",
        ours=1e3 * mine.wall_median / CALLS,
        peer=1e3 * other.wall_median / CALLS,
        peer_version=version,
        target=target,
        repeats=REPEATS,
        cpu_seconds=sum(mine.cpu + other.cpu),
        wall_seconds=sum(mine.wall + other.wall),
    )
    space = Row(
        name=f"memory of {name}",
        unit="MiB",
        ours=peaks[ours] / 2**20,
        peer=peaks[peer] / 2**20,
        peer_version=version,
        target=Target("ratio", "<=", 1.01) if peer == "topk step" else None,
        repeats=1,
        cpu_seconds=0.0,
        wall_seconds=0.0,
    )
    return [time, space]


if __name__ == "__main__":
    main()
