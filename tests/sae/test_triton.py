"""The Triton forms, on a CUDA device where there is one and else in Triton's interpreter, against float64 references.

Without a GPU the kernels are also compiled for two architectures, with the operands that the functions launch them on.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from trimtab.sae import functional as fn
from trimtab.sae import kernels, prefixes, triton_kernels
from trimtab.sae.encodings import DenseEncoding, Latents
from trimtab.sae.kron import KronEncoding
from trimtab.sae.objectives import RECONSTRUCTION, Hierarchical, hierarchical_weights
from trimtab.sae.prefixes import prefix_loss, prefix_loss_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1, 1, 1), (3, 5, 17, 131), (5, 11, 23, 300)]
"""Tokens, latents a token, latents, width."""


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, the dispatch takes CPU tensors for CUDA's."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "triton_forms", lambda t: None if t.dtype == torch.float64 else triton_kernels)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def latents(tokens: int, k: int, n_latents: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Values, a third of them 0, and indices that repeat within tokens (int32)."""
    g = torch.Generator().manual_seed(seed)
    values = (torch.rand(tokens, k, generator=g) - 1 / 3).relu()
    indices = torch.randint(n_latents, (tokens, k), generator=g, dtype=torch.int32)
    indices[:, -1] = indices[:, 0]
    return values.to(DEVICE), indices.to(DEVICE)


def close(found: Tensor, expected: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "k", "n_latents", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mix_rows(tokens: int, k: int, n_latents: int, d: int, dtype: torch.dtype) -> None:
    (values, indices), weight = latents(tokens, k, n_latents), random(n_latents, d).to(dtype)
    expected = (values.double()[..., None] * weight.double()[indices.long()]).sum(1)
    found = triton_kernels.mix_rows(values, indices, weight)
    assert found.dtype == dtype
    close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7)  # the interpreter cuts off, a GPU rounds


@pytest.mark.parametrize(("tokens", "k", "n_latents", "d"), SHAPES)
def test_row_products(tokens: int, k: int, n_latents: int, d: int) -> None:
    (_, indices), weight, g = latents(tokens, k, n_latents), random(n_latents, d), random(tokens, d, seed=2)
    expected = (weight.double()[indices.long()] * g.double()[:, None]).sum(-1)
    close(triton_kernels.row_products(g, weight, indices), expected, atol=1e-4)
    narrow = weight.bfloat16()
    expected = (narrow.double()[indices.long()] * g.double()[:, None]).sum(-1)
    close(triton_kernels.row_products(g, narrow, indices.long()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("piece", "tokens", "k", "n_latents", "d"),
    [(512, *shape) for shape in SHAPES] + [(1, 1, 1, 1, 1), (1, 3, 5, 6, 131), (2, 9, 6, 2, 5), (7, 9, 6, 1, 5)],
)
def test_add_outer_overwrites_or_accumulates_for_pieces_of_any_length(
    monkeypatch: pytest.MonkeyPatch, piece: int, tokens: int, k: int, n_latents: int, d: int
) -> None:
    monkeypatch.setattr(triton_kernels, "PIECE", piece)
    (values, indices), x = latents(tokens, k, n_latents), random(tokens, d, seed=2)
    dense = torch.zeros(tokens, n_latents, dtype=torch.float64, device=DEVICE)
    expected = dense.scatter_add_(1, indices.long(), values.double()).T @ x.double()
    out = torch.full((n_latents, d), torch.nan, device=DEVICE)
    close(triton_kernels.add_outer(values, indices, x, out), expected)
    close(triton_kernels.add_outer(values, indices, x, out, accumulate=True), 2 * expected)
    transposed = torch.full((d, n_latents), torch.nan, device=DEVICE).T
    assert triton_kernels.add_outer(values, indices, x, transposed) is transposed
    close(transposed, expected)


def test_a_latent_of_every_token_is_summed_and_always_to_the_same_bits() -> None:
    values, x = random(1100, 1), random(1100, 40, seed=2)
    indices = torch.full((1100, 1), 2, device=DEVICE)
    found = [triton_kernels.add_outer(values, indices, x, torch.empty(4, 40, device=DEVICE)) for _ in range(2)]
    close(found[0][2], (values.double() * x.double()).sum(0), atol=1e-4)
    assert not found[0][[0, 1, 3]].any()
    assert torch.equal(*found)


def test_no_tokens_are_no_error() -> None:
    values, indices = torch.zeros(0, 3, device=DEVICE), torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    weight, x = random(5, 6), torch.zeros(0, 6, device=DEVICE)
    assert triton_kernels.mix_rows(values, indices, weight).shape == (0, 6)
    assert triton_kernels.row_products(x, weight, indices).shape == (0, 3)
    assert not triton_kernels.add_outer(values, indices, x, torch.full((5, 6), torch.nan, device=DEVICE)).any()


def test_operands_may_be_strided() -> None:
    (values, indices), weight, g = latents(6, 8, 20), random(33, 20).T, random(33, 6, seed=2).T
    apart, other = values[:, ::2], indices[:, ::2]
    rows = weight.double()[other.long()]
    close(triton_kernels.mix_rows(apart, other, weight), (apart.double()[..., None] * rows).sum(1))
    close(triton_kernels.row_products(g, weight, other), (rows * g.double()[:, None]).sum(-1), atol=1e-4)


@pytest.mark.parametrize("n_latents", [5, 40])
def test_gradients_of_the_sparse_decoder(everywhere: None, n_latents: int) -> None:
    values, indices = latents(6, 4, n_latents)
    floating = [values, random(n_latents, 37), random(37, seed=3)]
    upstream = random(6, 37, seed=4)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        v, decoder, bias = (t.to(dtype).requires_grad_() for t in floating)
        loss = (fn.sparse_decode(Latents(v, indices), decoder, bias) * upstream.to(dtype)).sum()
        return torch.autograd.grad(loss, [v, decoder, bias])

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        close(found, expected)


# -- the largest entries of rows -------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 1), (5, 1000, 3), (3, 2053, 17), (4, 777, 12), (2, 50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_columns_are_the_largest(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    product = random(rows, n).to(dtype)  # in bfloat16 with ties
    values, columns = triton_kernels.top_columns(product, k)
    assert torch.equal(values.sort(descending=True).values, product.topk(k).values)
    assert torch.equal(product.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_top_columns_finds_entries_that_lie_together_or_are_all_equal() -> None:
    together = torch.zeros(2, 1000, device=DEVICE)
    together[:, 500:510] = torch.arange(1.0, 11.0, device=DEVICE)
    values, columns = triton_kernels.top_columns(together, 10)
    assert values.sum().item() == 110
    assert sorted(columns[0].tolist()) == list(range(500, 510))
    assert triton_kernels.top_columns(torch.full((1, 1000), -3.0, device=DEVICE), 5)[0].tolist() == [[-3.0] * 5]


def test_top_columns_hides_no_nan() -> None:
    product = random(2, 1001)
    product[0, 700] = torch.nan
    values, columns = triton_kernels.top_columns(product, 4)
    assert values.isnan().sum(1).tolist() == [1, 0]
    assert 700 in columns[0].tolist()


def test_top_columns_leaves_no_row_however_ties_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_of_equals(entries: Tensor, k: int, **_: Any) -> Any:
        values, places = (t[:, :k].flip(-1) for t in entries.flip(-1).sort(dim=-1, descending=True, stable=True))
        return torch.return_types.topk((values, entries.shape[1] - 1 - places))

    product = torch.full((1, 1001), -torch.inf, device=DEVICE)  # the last tile has 9 entries of the row
    product[0, 1000] = 1
    monkeypatch.setattr(Tensor, "topk", last_of_equals)
    values, columns = triton_kernels.top_columns(product, 4)
    assert values.tolist() == [[-torch.inf, -torch.inf, -torch.inf, 1]]
    assert columns.max() == 1000


# -- the prefix loss -------------------------------------------------------------------------------


def case(tokens: int, k: int, n_latents: int, d: int) -> list[Tensor]:
    values, indices = latents(tokens, k, n_latents)
    return [values, indices, random(n_latents, d), random(d, seed=3), random(tokens, d, seed=4)]


def weights_of(kind: str, tokens: int, k: int) -> Tensor:
    found = {
        "all": hierarchical_weights(k),
        "some": torch.arange(k + 1.0) % 3,  # 0 for the bias alone, and for every third prefix
        "last": hierarchical_weights(k, [k]),
        "each-token": random(tokens, k + 1, seed=5).abs(),
    }
    return found[kind].to(DEVICE)


def loss_and_gradients(function: Callable[..., Any], tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    found = function(*leaves, weights)
    loss = found[0] if isinstance(found, tuple) else found
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


@pytest.mark.parametrize("weights", ["all", "some", "last", "each-token"])
@pytest.mark.parametrize(("tokens", "k", "n_latents", "d"), SHAPES)
def test_prefix_loss_and_its_gradients(
    everywhere: None, tokens: int, k: int, n_latents: int, d: int, weights: str
) -> None:
    tensors, chosen = case(tokens, k, n_latents, d), weights_of(weights, tokens, k)
    found = loss_and_gradients(prefix_loss, tensors, chosen)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    expected = loss_and_gradients(prefix_loss_reference, wide, chosen.double())
    assert len(found) == len(expected) == 5
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        close(mine, reference, atol=1e-6)


def test_prefix_loss_of_a_bfloat16_decoder_is_summed_in_float32(everywhere: None) -> None:
    tensors, weights = case(5, 11, 23, 300), weights_of("all", 5, 11)
    tensors[2] = tensors[2].bfloat16()
    found = loss_and_gradients(prefix_loss, tensors, weights)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    expected = loss_and_gradients(prefix_loss_reference, wide, weights.double())
    assert found[2].dtype == torch.bfloat16
    close(found.pop(2), expected.pop(2), rtol=2**-8)
    for mine, reference in zip(found, expected, strict=True):
        close(mine, reference, atol=1e-6)


def test_prefix_loss_without_gradients_or_without_the_decoders_is_the_same() -> None:
    tensors, weights = case(3, 5, 17, 131), weights_of("all", 3, 5)
    d_decoder = torch.ones(17, 131, device=DEVICE)
    whole = triton_kernels.prefix_loss_and_gradients(*tensors, weights, d_decoder=d_decoder)
    without = triton_kernels.prefix_loss_and_gradients(*tensors, weights)
    alone = triton_kernels.prefix_loss_and_gradients(*tensors, weights, with_gradients=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, without, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], alone[:2], strict=True))
    assert alone[2].numel() == alone[3].numel() == 0
    reference = loss_and_gradients(prefix_loss_reference, tensors, weights.float())
    close(d_decoder - 1, reference[2], atol=1e-6)  # added to what was there


def test_walking_down_256_ranks_costs_no_more_than_their_roundings() -> None:
    values, indices, decoder, bias, target = case(2, 256, 300, 6)
    weights = hierarchical_weights(256).to(DEVICE)
    found = triton_kernels.prefix_loss_and_gradients(values, indices, decoder, bias, target, weights)
    wide = (t.double() for t in (decoder, bias, target))
    expected = prefixes.prefix_loss_and_gradients(values.double(), indices, *wide, weights)
    for mine, reference in zip(found, expected, strict=True):
        assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()


# -- the dispatch ----------------------------------------------------------------------------------


class _OnCuda(Tensor):
    is_cuda = True


def test_where_the_triton_forms_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.zeros(2), torch.zeros(2).as_subclass(_OnCuda)
    assert kernels.triton_forms(here) is None
    assert kernels.triton_forms(there) is triton_kernels
    assert kernels.triton_forms(there.bfloat16()) is triton_kernels
    assert kernels.triton_forms(there.double()) is None
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert kernels.triton_forms(there) is None


@pytest.mark.parametrize(
    ("encoding", "objective"),
    [(DenseEncoding(), Hierarchical()), (KronEncoding(h=13, m=2, n=5), RECONSTRUCTION)],
    ids=["dense-hierarchical", "kron-reconstruction"],
)
def test_a_whole_step_equals_that_of_plain_pytorch_in_float64(everywhere: None, objective: Any, encoding: Any) -> None:
    n_latents, d, tokens = 130, 23, 9
    rows = n_latents if isinstance(encoding, DenseEncoding) else encoding.rows
    weights = fn.Weights(random(rows, d), random(rows, seed=1) / 10, random(n_latents, d, seed=2), random(d, seed=3))
    x, dead = random(tokens, d, seed=4), torch.arange(0, n_latents, 3, device=DEVICE)
    options = {"k": 2, "variance": 20.0, "encoding": encoding, "objective": objective, "dead": dead}
    options |= {"k_aux": 5, "alpha": 0.1}

    def step(dtype: torch.dtype) -> tuple[fn.StepOutput, fn.Weights]:
        gradients = fn.Weights(*(torch.full_like(t, torch.nan, dtype=dtype) for t in weights))
        wide = fn.Weights(*(t.to(dtype) for t in weights))
        return fn.loss_and_gradients(x.to(dtype), x.to(dtype), wide, gradients, **options), gradients

    (found, gradients), (expected, reference) = step(torch.float32), step(torch.float64)
    close(found.loss, expected.loss)
    close(found.aux_loss, expected.aux_loss)
    close(found.residual, expected.residual, atol=1e-4)
    for mine, other in zip(gradients, reference, strict=True):
        close(mine, other, atol=1e-4)


def test_determinism_takes_the_prefix_loss_to_pytorch(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weights, calls = case(3, 5, 17, 40), weights_of("all", 3, 5), []
    fused = triton_kernels.prefix_loss_and_gradients

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["d_decoder"] is not None)
        return fused(*args, **kwargs)

    monkeypatch.setattr(triton_kernels, "prefix_loss_and_gradients", counted)
    first = loss_and_gradients(prefix_loss, tensors, weights)
    assert calls == [True]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        second, third = (loss_and_gradients(prefix_loss, tensors, weights) for _ in range(2))
        assert calls == [True]
        prefix_loss(*tensors, weights)
        assert calls == [True, False]  # without the decoder's gradient the fused form is deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, second, third, strict=True):
        close(a, b, atol=1e-6)
        assert torch.equal(b, c)


# -- compiling -------------------------------------------------------------------------------------


def test_kernels_compile_and_triton_is_not_imported_before_it_is_used(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import sys, trimtab.sae; assert 'triton' not in sys.modules"
    code += f"; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_triton; test_triton.compile_kernels()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(name for name in vars(triton_kernels) if name.endswith("_kernel"))


def compile_kernels() -> None:
    """Compile what the public functions launch, in place of launching it, and print the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
    launched = set()

    def compile_only(
        architecture: int, kernel: Any, grid: object, *operands: Any, num_warps: int = 4, **constants: Any
    ) -> None:
        signature, constants = {}, dict(constants)
        for name, operand in zip(kernel.arg_names, operands, strict=False):
            if isinstance(operand, int) and operand == 1:  # Triton makes a constant of it when it launches, too
                constants[name] = 1
            signature[name] = pointers[operand.dtype] if isinstance(operand, Tensor) else "i32"
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", architecture, 32)
        assert triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]
        launched.add(kernel.__name__)

    triton_kernels.PIECE = 2
    for dtype, architecture, shape in ((torch.float32, 90, SHAPES[1]), (torch.bfloat16, 80, SHAPES[0])):
        triton_kernels._launch = functools.partial(compile_only, architecture)
        tokens, k, n_latents, d = shape
        values, indices, decoder, bias, target = case(tokens, k, n_latents, d)
        decoder = decoder.to(dtype)
        triton_kernels.mix_rows(values, indices, decoder)
        triton_kernels.row_products(target, decoder, indices)
        triton_kernels.add_outer(values, indices, target, torch.empty(n_latents, d), accumulate=dtype == torch.float32)
        for into in (None, torch.zeros(n_latents, d)):
            triton_kernels.prefix_loss_and_gradients(
                values, indices, decoder, bias, target, torch.ones(k + 1), d_decoder=into
            )
        triton_kernels.top_columns(random(tokens, 100 * k).to(dtype), k)
    print(*sorted(launched))
