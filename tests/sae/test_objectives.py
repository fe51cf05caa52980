"""Prefix losses: the oracles of HierarchicalTopK (arXiv 2505.24473), Multi-TopK and Matryoshka on plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import prefixes
from trimtab.sae.objectives import (
    hierarchical_topk_loss,
    hierarchical_weights,
    matryoshka_weights,
    multi_topk_weights,
)
from trimtab.sae.prefixes import prefix_loss, prefix_loss_reference


def case(tokens: int = 5, k: int = 7, n_latents: int = 20, d: int = 6, *, seed: int = 0) -> dict[str, Tensor]:
    """Float64 latents in order of value, some repeated within a token, the last one 0, and what they decode with."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(tokens, k, generator=g, dtype=torch.float64).sort(descending=True).values
    values[:, -1] = 0
    indices = torch.randint(n_latents, (tokens, k), generator=g)
    indices[:, -1] = indices[:, 0]
    tensors = {"values": values, "indices": indices}
    for name, shape in (("decoder", (n_latents, d)), ("decoder_bias", (d,)), ("target", (tokens, d))):
        tensors[name] = torch.randn(shape, generator=g, dtype=torch.float64)
    return tensors


def with_gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}


def loss_and_gradients(function: Any, tensors: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    leaves = with_gradients(tensors)
    found = function(*leaves.values(), weights)
    loss = found[0] if isinstance(found, tuple) else found
    loss.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


WEIGHTS = {
    "all": hierarchical_weights(7),
    "some": hierarchical_weights(7, [2, 5], [1.0, 3.0]),
    "last": hierarchical_weights(7, [7]),
    "each-token": torch.rand(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
}


@pytest.mark.parametrize("ranks", [1, 3, 7, 8])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients_are_those_of_the_reference_for_every_block_size(
    monkeypatch: pytest.MonkeyPatch, weights: str, block: int, ranks: int
) -> None:
    monkeypatch.setattr(prefixes, "RANKS", ranks)
    monkeypatch.setattr(prefixes, "BLOCK_ELEMENTS", block)
    found = loss_and_gradients(prefix_loss, case(), WEIGHTS[weights])
    expected = loss_and_gradients(prefix_loss_reference, case(), WEIGHTS[weights])
    assert len(found) == len(expected) == 5
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("tokens", "k", "d"), [(1, 1, 1), (1, 9, 65), (17, 16, 3), (3, 33, 64)])
def test_any_shape_will_do(tokens: int, k: int, d: int) -> None:
    tensors, weights = case(tokens, k, 50, d), hierarchical_weights(k)
    found = loss_and_gradients(prefix_loss, tensors, weights)
    for mine, reference in zip(found, loss_and_gradients(prefix_loss_reference, tensors, weights), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    leaves = with_gradients(case(3, 4, 6, 5))

    def loss(values: Tensor, decoder: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return prefix_loss(values, leaves["indices"], decoder, bias, target, hierarchical_weights(4, [1, 3]))[0]

    assert torch.autograd.gradcheck(loss, [leaf for leaf in leaves.values() if leaf.requires_grad])


def test_the_largest_budget_alone_is_the_mean_squared_error_of_topk() -> None:
    tensors = case()
    loss, reconstruction = hierarchical_topk_loss(*tensors.values(), budgets=[7])
    expected = tensors["decoder_bias"] + (tensors["values"][..., None] * tensors["decoder"][tensors["indices"]]).sum(1)
    torch.testing.assert_close(reconstruction, expected)
    torch.testing.assert_close(loss, (expected - tensors["target"]).square().mean())


def test_one_latent_is_top_1() -> None:
    tensors = case(k=1)
    tensors["values"] += 1
    loss, _ = hierarchical_topk_loss(*tensors.values())
    first = tensors["decoder_bias"] + tensors["values"] * tensors["decoder"][tensors["indices"][:, 0]]
    torch.testing.assert_close(loss, (first - tensors["target"]).square().mean())


def test_latents_are_sorted_unless_they_are_said_to_be() -> None:
    tensors = case()
    sorted_loss, _ = hierarchical_topk_loss(*tensors.values())
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    mixed = tensors | {"values": tensors["values"][:, order], "indices": tensors["indices"][:, order]}
    torch.testing.assert_close(hierarchical_topk_loss(*mixed.values())[0], sorted_loss)
    unsorted_loss, _ = hierarchical_topk_loss(*mixed.values(), assume_sorted=True)
    reference = prefix_loss_reference(*mixed.values(), hierarchical_weights(7))
    torch.testing.assert_close(unsorted_loss, reference)
    assert abs(unsorted_loss - sorted_loss) > 1e-3


def test_gradients_of_unsorted_values_come_back_in_their_own_order() -> None:
    tensors, order = case(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    mixed = tensors | {"values": tensors["values"][:, order], "indices": tensors["indices"][:, order]}
    gradients = []
    for each in (tensors, mixed):
        leaves = with_gradients(each)
        hierarchical_topk_loss(*leaves.values())[0].backward()
        gradients.append(leaves["values"].grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    torch.testing.assert_close(gradients[1], gradients[0][:, order])


def test_closed_form_for_orthonormal_rows() -> None:
    """|x - x_hat_j|^2 = sum_(t <= j) (a_t - v_t)^2 + sum_(t > j) a_t^2 + |r|^2, r orthogonal to the rows."""
    g = torch.Generator().manual_seed(1)
    decoder = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    a, v = (torch.rand(4, generator=g, dtype=torch.float64) for _ in range(2))
    v = v.sort(descending=True).values
    rest = 0.7 * decoder[11]
    target = (a[:, None] * decoder[:4]).sum(0) + rest
    errors = [((a - v)[:j].square().sum() + a[j:].square().sum() + rest.square().sum()) / 12 for j in range(1, 5)]
    zero = torch.zeros(12, dtype=torch.float64)
    loss, _ = hierarchical_topk_loss(v[None], torch.arange(4)[None], decoder, zero, target[None])
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_equal_values_may_change_places_only_where_their_rows_are_equal() -> None:
    tensors = case(tokens=1, n_latents=200)
    assert len(tensors["indices"].unique()) == 6  # only the last repeats one
    tensors["values"][:, 1] = tensors["values"][:, 2]
    swapped = tensors | {"indices": tensors["indices"][:, [0, 2, 1, 3, 4, 5, 6]]}
    assert abs(hierarchical_topk_loss(*tensors.values())[0] - hierarchical_topk_loss(*swapped.values())[0]) > 1e-4
    tensors["decoder"][tensors["indices"][:, 1]] = tensors["decoder"][tensors["indices"][:, 2]]
    same = hierarchical_topk_loss(*(tensors | {"indices": swapped["indices"]}).values())[0]
    torch.testing.assert_close(same, hierarchical_topk_loss(*tensors.values())[0])


def test_the_gradients_of_bias_and_target_are_opposite() -> None:
    _, _, _, d_bias, d_target = loss_and_gradients(prefix_loss, case(), WEIGHTS["all"])
    torch.testing.assert_close(d_bias, -d_target.sum(0))


def test_other_layouts_and_integers_are_accepted() -> None:
    tensors = case()
    plain = hierarchical_topk_loss(*tensors.values())[0]
    turned = {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in tensors.items()}
    turned["indices"] = turned["indices"].int()
    torch.testing.assert_close(hierarchical_topk_loss(*turned.values())[0], plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_sums_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    tensors = case(32, 64, 200, 48)
    exact = loss_and_gradients(prefix_loss, tensors, hierarchical_weights(64))
    low = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    found = loss_and_gradients(prefix_loss, low, hierarchical_weights(64))
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype, dtype, dtype]
    for mine, reference in zip(found, exact, strict=True):
        assert (mine.double() - reference).norm() <= tolerance * reference.norm()


def test_no_gradient_is_made_for_what_needs_none() -> None:
    tensors = case()
    leaves = tensors | {"decoder_bias": tensors["decoder_bias"].clone().requires_grad_()}
    hierarchical_topk_loss(*leaves.values())[0].backward()
    expected = loss_and_gradients(prefix_loss_reference, tensors, WEIGHTS["all"])[3]
    torch.testing.assert_close(leaves["decoder_bias"].grad, expected)
    assert not hierarchical_topk_loss(*tensors.values())[0].requires_grad


def test_no_tensor_of_tokens_times_k_times_d_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            sizes = [
                t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(found) if isinstance(t, Tensor)
            ]
            self.entries = max([self.entries, *sizes])
            return found

    tensors = {name: t.float() if t.is_floating_point() else t for name, t in case(256, 128, 300, 512).items()}
    leaves = with_gradients(tensors)
    with Largest() as largest:
        hierarchical_topk_loss(*leaves.values())[0].backward()
    assert 256 * 128 <= largest.entries <= prefixes.BLOCK_ELEMENTS < 256 * 128 * 512


# -- Multi-TopK and Matryoshka ----------------------------------------------------------------------


def test_multi_topk_adds_an_eighth_of_the_loss_at_four_times_k() -> None:
    tensors = case(k=8)
    found = prefix_loss_reference(*tensors.values(), multi_topk_weights(2))
    two, eight = (hierarchical_topk_loss(*tensors.values(), budgets=[j])[0] for j in (2, 8))
    torch.testing.assert_close(found, two + eight / 8)
    torch.testing.assert_close(prefix_loss(*tensors.values(), multi_topk_weights(2))[0], found)


def test_matryoshka_takes_prefixes_of_the_dictionary() -> None:
    tensors, cuts = case(n_latents=20), (1, 4, 12, 20)
    tensors["indices"] = torch.stack(
        [torch.randperm(20, generator=torch.Generator().manual_seed(i))[:7] for i in range(5)]
    )
    indices, order = tensors["indices"].sort(dim=-1)
    values, weights = tensors["values"].gather(-1, order), matryoshka_weights(indices, cuts)
    dense = torch.zeros(5, 20, dtype=torch.float64).scatter(1, tensors["indices"], tensors["values"])
    errors = [
        (dense[:, :q] @ tensors["decoder"][:q] + tensors["decoder_bias"] - tensors["target"]).square().mean()
        for q in cuts
    ]
    loss, _ = prefix_loss(values, indices, *list(tensors.values())[2:], weights)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": []}, r"budgets=\[\]"),
        ({"budgets": [0]}, r"budgets=\[0\].*1 to k=7"),
        ({"budgets": [8]}, r"budgets=\[8\]"),
        ({"budgets": [2, 2]}, r"budgets=\[2, 2\].*rising"),
        ({"budgets": [3, 2]}, r"budgets=\[3, 2\].*rising"),
        ({"budgets": [True, 2]}, r"budgets=\[True, 2\].*whole"),
        ({"budgets": [2, 3], "weights": [1.0]}, r"weights=\[1.0\].*2 numbers"),
        ({"budgets": [2, 3], "weights": [1.0, -1.0]}, r"weights=\[1.0, -1.0\]"),
        ({"budgets": [2, 3], "weights": [0.0, 0.0]}, r"not all 0"),
        ({"budgets": [2, 3], "weights": [1.0, float("nan")]}, r"weights="),
    ],
)
def test_bad_budgets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        hierarchical_topk_loss(*case().values(), **arguments)


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no-token": (
        {"values": torch.zeros(0, 7), "indices": torch.zeros(0, 7).long(), "target": torch.zeros(0, 6)},
        "one token",
    ),
    "flat-values": ({"values": torch.zeros(7)}, "accepted: .tokens, k."),
    "indices-shape": ({"indices": torch.zeros(5, 6).long()}, "indices has shape"),
    "index-high": ({"indices": torch.full((5, 7), 20)}, "indices run from 20 to 20; accepted: 0 to 19"),
    "index-negative": ({"indices": torch.full((5, 7), -1)}, "indices run from -1"),
    "target-width": ({"target": torch.zeros(5, 7)}, "target has shape"),
    "bias-width": ({"decoder_bias": torch.zeros(5)}, "b_dec has shape"),
    "integer-values": ({"values": torch.zeros(5, 7).long()}, "values has dtype"),
    "float-indices": ({"indices": torch.zeros(5, 7)}, "indices has dtype"),
    "few-latents": ({"decoder": torch.zeros(6, 6), "indices": torch.zeros(5, 7).long()}, "n_latents=6"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name: str) -> None:
    changes, message = BAD_TENSORS[name]
    with pytest.raises(TrimtabError, match=message):
        hierarchical_topk_loss(*(case() | changes).values())
