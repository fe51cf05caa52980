"""A reference that follows a policy, outside of any trainer: whole models, adapters, partitions, files."""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.align import TrustRegionReference, UpdateSchedule
from trimtab.align.reference import FILE
from trimtab.core.errors import TrimtabError

pytestmark = pytest.mark.filterwarnings("ignore:alpha=.*averaging LoRA:UserWarning")

IDS = torch.arange(12).view(2, 6)
TARGETS = ["q_proj", "v_proj", "down_proj"]
COUNTS = {"n_updates": "1", "last_update": "1", "last_weight": "1.0"}


def llama(seed: int = 0, *, tied: bool = True, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()


def lora(seed: int = 0, r: int = 2, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(llama(seed), LoraConfig(r=r, target_modules=TARGETS, **options)).eval()


@torch.no_grad()
def perturb(model: nn.Module, seed: int, adapter: str | None = None) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if adapter is None or adapter in name.split("."):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=g))


@torch.no_grad()
def logits(model: Any, adapter: str | None = None) -> Tensor:
    if adapter is None:
        return model(input_ids=IDS).logits
    before = model.active_adapter
    model.set_adapter(adapter)
    try:
        return model(input_ids=IDS).logits
    finally:
        model.set_adapter(before)


def merged(model: Any) -> dict[str, Tensor]:
    """The effective weights of the policy's adapter."""
    clone = copy.deepcopy(model)
    clone.set_adapter("default")
    return dict(clone.merge_and_unload(adapter_names=["default"]).state_dict())


# -- whole models ----------------------------------------------------------------------------------


def test_soft_updates_are_averages_of_the_policies_that_were() -> None:
    policy, model = llama(0), llama(0)
    reference = TrustRegionReference.soft(0.3)
    reference.bind(policy, model)
    expected = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for step in range(1, 4):
        perturb(policy, step)
        assert reference.update(step, 3)
        for name, tensor in policy.named_parameters():
            expected[name].mul_(0.7).add_(tensor.detach(), alpha=0.3)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, expected[name])
    assert (reference.n_updates, reference.last_update) == (3, 3)


def test_a_hard_update_is_an_exact_copy_with_storages_of_its_own_and_tied_weights_stay_tied() -> None:
    policy, model = llama(0), llama(0)
    reference = TrustRegionReference.hard(2)
    reference.bind(policy, model)
    perturb(policy, 1)
    assert not reference.update(1, 4)
    assert reference.update(2, 4)
    copies = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert all(torch.equal(copies[name], tensor) for name, tensor in policy.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    perturb(policy, 2)
    assert all(torch.equal(copies[name], tensor) for name, tensor in model.named_parameters())
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model), logits(policy))


def test_the_reference_takes_no_gradient_and_is_in_evaluation_mode() -> None:
    policy, model = llama(0).train(), llama(0).train()
    TrustRegionReference.soft(0.5).bind(policy, model)
    assert not model.training
    assert not any(tensor.requires_grad for tensor in model.parameters())
    policy(input_ids=IDS, labels=IDS).loss.backward()
    assert all(tensor.grad is None for tensor in model.parameters())


def test_buffers_are_copied_on_hard_updates_alone() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    for reference, copied in ((TrustRegionReference.hard(1), True), (TrustRegionReference.soft(0.5), False)):
        policy, other = model(), model()
        reference.bind(policy, other)
        policy[1].running_mean.fill_(3.0)
        reference.update(1, 1)
        assert (float(other[1].running_mean[0]) == 3.0) is copied


def test_names_are_matched_without_wrappers_and_whatever_the_order() -> None:
    class Wrapper(nn.Module):
        def __init__(self, name: str, module: nn.Module) -> None:
            super().__init__()
            self.add_module(name, module)

    first = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    second = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    reference = TrustRegionReference.hard(1)
    reference.bind(Wrapper("module", first), Wrapper("_orig_mod", Wrapper("_fsdp_wrapped_module", second)))
    reference.update(1, 1)
    assert torch.equal(first["a"].weight, second["a"].weight)
    assert torch.equal(first["b"].weight, second["b"].weight)


def test_a_bfloat16_reference_follows_in_float32() -> None:
    """1,000 soft updates of about one step at a learning rate of 1e-6: a plain bfloat16 average stands still."""
    g = torch.Generator().manual_seed(0)
    policy = nn.Linear(16, 16, bias=False)
    start = policy.weight.detach().clone()
    exact = start.bfloat16().float()
    model, naive = nn.Linear(16, 16, bias=False).bfloat16(), start.bfloat16()
    model.weight.data.copy_(start)
    reference = TrustRegionReference.soft(0.6)
    reference.bind(policy, model)
    with torch.no_grad():
        for step in range(1, 1001):
            policy.weight.add_(1e-6 * torch.rand(16, 16, generator=g))
            reference.update(step, 1000)
            exact.lerp_(policy.weight, 0.6)
            naive.lerp_(policy.weight.bfloat16(), 0.6)
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert bool(((model.weight.float() - exact).abs() <= ulp).all())
    assert torch.equal(model.weight, exact.bfloat16())
    assert not torch.equal(naive, exact.bfloat16())


# -- adapters --------------------------------------------------------------------------------------


def test_the_first_reference_of_a_new_adapter_is_the_base() -> None:
    model = lora()
    draws = torch.random.get_rng_state()
    TrustRegionReference.hard(1).bind(model)
    assert torch.equal(torch.random.get_rng_state(), draws)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model, "ref"), base)
    assert list(model.active_adapters) == ["default"]
    trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trained
    assert not any(".ref." in name for name in trained)


def test_the_first_reference_of_an_adapter_that_was_trained_is_its_copy() -> None:
    model = lora()
    perturb(model, 1, "default")
    TrustRegionReference.hard(1).bind(model)
    assert torch.equal(logits(model, "ref"), logits(model))


@pytest.mark.parametrize("kind", ["factors", "exact"])
def test_a_reference_that_is_there_stays_as_it_is(kind: str) -> None:
    model = lora()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=TARGETS))
    perturb(model, 1, "default")
    perturb(model, 2, "ref")
    before = logits(model, "ref")
    TrustRegionReference.soft(0.4, lora=kind).bind(model)
    torch.testing.assert_close(logits(model, "ref"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_reference_takes_nothing_out_of_the_base(init: str) -> None:
    """These begin an adapter by a decomposition of the base's weights, which they change."""
    model = lora(init_lora_weights=init)
    before = logits(model)
    TrustRegionReference.hard(1).bind(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model, "ref"), before)


@pytest.mark.parametrize("then", ["factors", "exact"])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_second_run_forgets_the_dense_average_of_the_first(then: str, deleted: bool) -> None:
    model = lora()
    first = TrustRegionReference.soft(0.4, lora="exact")
    first.bind(model)
    perturb(model, 1, "default")
    first.update(1, 1)
    if deleted:
        model.delete_adapter("ref")
    TrustRegionReference.soft(0.4, lora=then).bind(model)
    torch.testing.assert_close(logits(model, "ref"), logits(model), atol=1e-5, rtol=1e-5)


def test_a_hard_update_copies_the_factors_alone() -> None:
    model = lora()
    reference = TrustRegionReference.hard(1)
    reference.bind(model)
    assert reference.n_tensors == 2 * len(TARGETS) * 2
    perturb(model, 1, "default")
    before = logits(model, "ref")
    reference.update(1, 1)
    assert torch.equal(logits(model, "ref"), logits(model))
    assert not torch.equal(before, logits(model))


def test_exact_averages_are_averages_of_weights_whose_rank_grows() -> None:
    model = lora(r=2)
    reference = TrustRegionReference.soft(0.4, lora="exact")
    reference.bind(model)
    expected = {name: tensor.clone() for name, tensor in merged(model).items()}
    base = {name: tensor.clone() for name, tensor in expected.items()}
    for step in range(1, 6):
        perturb(model, step, "default")
        reference.update(step, 5)
        for name, tensor in merged(model).items():
            expected[name].lerp_(tensor, 0.4)
    averaged = llama(0)
    averaged.load_state_dict(expected)
    torch.testing.assert_close(logits(model, "ref"), logits(averaged), atol=1e-5, rtol=1e-5)
    name = "model.layers.0.mlp.down_proj.weight"
    rank = int(torch.linalg.matrix_rank((expected[name] - base[name]).double(), rtol=1e-5))
    assert rank == 5 * 2


def test_averages_of_factors_are_another_thing() -> None:
    weights = {}
    for kind in ("factors", "exact"):
        model = lora()
        reference = TrustRegionReference.soft(0.4, lora=kind)
        reference.bind(model)
        for step in (1, 2):
            perturb(model, step, "default")
            reference.update(step, 2)
        weights[kind] = logits(model, "ref")
    assert not torch.allclose(weights["factors"], weights["exact"], atol=1e-4)


def test_the_dense_average_leaves_the_policy_and_the_base_alone() -> None:
    model = lora()
    perturb(model, 1, "default")
    policy = logits(model)
    with model.disable_adapter():
        base = logits(model)
    reference = TrustRegionReference.soft(0.4, lora="exact")
    reference.bind(model)
    torch.testing.assert_close(logits(model, "ref"), policy, atol=1e-5, rtol=1e-5)
    reference.update(1, 1)
    assert torch.equal(logits(model), policy)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_exact_averages_are_made_for_an_alpha_that_falls_below_one() -> None:
    model = lora()
    reference = TrustRegionReference(UpdateSchedule(alpha=1, tau=1, final_alpha=0.5), lora="exact")
    reference.bind(model)
    base = merged(model)
    perturb(model, 1, "default")
    reference.update(2, 2)
    averaged = llama(0)
    averaged.load_state_dict({name: (base[name] + tensor) / 2 for name, tensor in merged(model).items()})
    torch.testing.assert_close(logits(model, "ref"), logits(averaged), atol=1e-5, rtol=1e-5)


class Int8Linear(nn.Linear):
    """A layer of integers, which no adapter can be merged into."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kind", ["factors", "exact"])
def test_a_quantised_base_is_neither_read_nor_written(kind: str) -> None:
    """Reference and policy share it: what is averaged is what the adapters add, as on the base's rounded weights."""
    found = []
    for quantised in (True, False):
        base = llama(0, tied=False)
        for layer in base.model.layers:
            for block, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "down_proj")):
                integers = Int8Linear(getattr(block, name))
                if quantised:
                    setattr(block, name, integers)
                else:
                    getattr(block, name).weight.data = integers.weight.float() * integers.scale
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS)).eval()
        before = {n: t.clone() for n, t in model.named_parameters() if "lora_" not in n}
        reference = TrustRegionReference.soft(0.4, lora=kind, measure=True)
        reference.bind(model)
        for step in (1, 2, 3):
            perturb(model, step, "default")
            reference.update(step, 3)
        with reference.as_at_first():
            first = logits(model, "ref")
        found.append((logits(model, "ref"), first, torch.tensor(reference.distance())))
        assert all(torch.equal(t, before[n]) for n, t in model.named_parameters() if "lora_" not in n)
    for of_integers, of_floats in zip(*found, strict=True):
        torch.testing.assert_close(of_integers, of_floats, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_averaging_factors_warns() -> None:
    with pytest.warns(UserWarning, match="only approximates averaging the weights"):
        TrustRegionReference.soft(0.4).bind(lora())


def test_modules_that_are_saved_whole_follow_too() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(tied=False), config).eval()
    reference = TrustRegionReference.soft(0.5, lora="exact")
    reference.bind(model)
    head = model.base_model.model.lm_head.modules_to_save
    before = head["ref"].weight.clone()
    perturb(model, 1, "default")
    reference.update(1, 1)
    torch.testing.assert_close(head["ref"].weight, (before + head["default"].weight) / 2)
    assert not head["ref"].weight.requires_grad


def test_another_kind_of_adapter_follows_by_its_tensors() -> None:
    torch.manual_seed(0)
    config = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(llama(), config).eval()
    reference = TrustRegionReference.hard(1)
    reference.bind(model)
    perturb(model, 1, "default")
    reference.update(1, 1)
    assert torch.equal(logits(model, "ref"), logits(model))


# -- DeepSpeed's partitions, on a stand-in ----------------------------------------------------------


class FakeZero:
    """Parameters that are empty but while gathered; only what process 0 writes is kept, as in ZeRO-3."""

    def __init__(self, rank: int) -> None:
        self.rank, self.whole, self.open = rank, {}, 0

    def partition(self, module: nn.Module) -> nn.Module:
        for index, tensor in enumerate(module.parameters()):
            tensor.ds_id, tensor.ds_shape = index, tensor.shape  # type: ignore[attr-defined]
            self.whole[tensor] = tensor.detach().clone()
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        return module

    @contextmanager
    def GatheredParameters(self, tensors: Sequence[Tensor], modifier_rank: int) -> Iterator[None]:
        self.open += 1
        assert modifier_rank == 0
        for tensor in tensors:
            tensor.data = self.whole[tensor].clone()
        yield
        for tensor in tensors:
            if self.rank == 0:
                self.whole[tensor] = tensor.detach().clone()
            tensor.data = torch.empty(0, dtype=tensor.dtype)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_partitions_of_both_models_are_gathered_and_the_first_process_writes(
    rank: int, alpha: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeZero(rank)
    module = types.ModuleType("deepspeed")
    module.zero = fake  # type: ignore[attr-defined]
    module.comm = types.SimpleNamespace(get_rank=lambda: rank)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    policy, model = llama(0), llama(1)
    expected = {n: t.detach().clone() for n, t in model.named_parameters()}
    if rank == 0:
        for name, tensor in policy.named_parameters():
            expected[name].lerp_(tensor.detach(), alpha)
    fake.partition(policy), fake.partition(model)
    reference = TrustRegionReference(UpdateSchedule(alpha=alpha, tau=1))
    reference.bind(policy, model)
    reference.update(1, 1)
    assert fake.open == len(expected)
    for name, tensor in model.named_parameters():
        assert tensor.numel() == 0
        torch.testing.assert_close(fake.whole[tensor], expected[name])
    reference.save(tmp_path / FILE, writes=rank == 0)
    if rank == 0:
        assert all(torch.allclose(t, expected[n]) for n, t in load_file(tmp_path / FILE).items())
        again = fake.partition(llama(2))
        other = TrustRegionReference(UpdateSchedule(alpha=alpha, tau=1))
        other.bind(policy, again)
        other.load(tmp_path / FILE)
        assert all(torch.allclose(fake.whole[t], expected[n]) for n, t in again.named_parameters())


def test_a_bfloat16_reference_in_partitions_goes_on_from_its_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, module = FakeZero(0), types.ModuleType("deepspeed")
    module.zero = fake  # type: ignore[attr-defined]
    module.comm = types.SimpleNamespace(get_rank=lambda: 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    policy = fake.partition(llama(0).bfloat16())
    found = []
    for seed in (1, 2):
        reference = TrustRegionReference.soft(0.25)
        reference.bind(policy, fake.partition(llama(seed).bfloat16()))
        if seed == 2:
            reference.load(tmp_path / FILE)
        else:
            reference.update(1, 2)
            reference.save(tmp_path / FILE)
        reference.update(2, 2)
        found.append(reference._masters)
    assert len(found[0]) > 0
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_each_process_gathers_equally_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or they wait for each other. The float32 master is on the process that writes, and on no other."""
    counts = []
    for rank in (0, 1):
        fake, module = FakeZero(rank), types.ModuleType("deepspeed")
        module.zero = fake  # type: ignore[attr-defined]
        module.comm = types.SimpleNamespace(get_rank=lambda rank=rank: rank)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "deepspeed", module)
        policy, model = fake.partition(llama(0).bfloat16()), fake.partition(llama(1).bfloat16())
        reference = TrustRegionReference.soft(0.25)
        reference.bind(policy, model)
        opened = [fake.open]
        reference.update(1, 2)
        opened.append(fake.open)
        reference.save(tmp_path / FILE, writes=rank == 0)
        opened.append(fake.open)
        reference.load(tmp_path / FILE)
        opened.append(fake.open)
        assert len(reference._masters) == (len(list(model.parameters())) if rank == 0 else 0)
        counts.append([after - before for before, after in itertools.pairwise(opened)])
    assert counts[0] == counts[1]
    assert min(counts[0]) >= len(list(llama(0).parameters()))
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.float32}


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "bfloat16", "factors", "exact"])
def test_what_was_saved_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    def begin() -> tuple[Any, TrustRegionReference]:
        reference = TrustRegionReference.soft(0.3, lora="exact" if kind == "exact" else "factors")
        if kind in ("factors", "exact"):
            policy, model = lora(), None
        else:
            policy, model = llama(0), llama(0).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
        reference.bind(policy, model)
        return policy, reference

    adapter = "default" if kind in ("factors", "exact") else None
    policy, reference = begin()
    perturb(policy, 1, adapter)
    reference.update(1, 2)
    reference.save(tmp_path / FILE)
    policy_2, again = begin()
    policy_2.load_state_dict(policy.state_dict())
    again.load(tmp_path / FILE)
    assert (again.n_updates, again.last_update, again.last_weight) == (1, 1, 0.3)
    for each, following in ((policy, reference), (policy_2, again)):
        perturb(each, 2, adapter)
        following.update(2, 2)
    found = again._held()
    assert found
    for name, tensor in reference._held().items():
        assert torch.equal(tensor, found[name]), name
    for name, master in reference._masters.items():
        assert torch.equal(master, again._masters[name])
    assert bool(reference._masters) is (kind == "bfloat16")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    reference = TrustRegionReference.hard(1)
    reference.bind(llama(0), llama(0))
    with pytest.raises(TrimtabError, match="missing: the checkpoint holds no reference"):
        reference.load(tmp_path / FILE)


def test_files_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    reference = TrustRegionReference.hard(1)
    reference.bind(llama(0), llama(0))
    reference.save(tmp_path / FILE)
    tensors = load_file(tmp_path / FILE)
    name = "model.norm.weight"
    save_file({**tensors, name: torch.zeros(3)}, tmp_path / "shape", COUNTS)
    with pytest.raises(TrimtabError, match=rf"{name}.* has shape \[3\] there and \[16\] here"):
        reference.load(tmp_path / "shape")
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "less", COUNTS)
    with pytest.raises(TrimtabError, match=f"{name}.* is in one of them alone"):
        reference.load(tmp_path / "less")
    (tmp_path / "cut").write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(TrimtabError, match="cannot be read"):
        reference.load(tmp_path / "cut")
    save_file(tensors, tmp_path / "bare")
    with pytest.raises(TrimtabError, match="has no counts"):
        reference.load(tmp_path / "bare")


def test_the_initial_reference_can_be_looked_at_and_the_current_one_comes_back() -> None:
    policy, model = llama(0), llama(0)
    first = logits(model)
    reference = TrustRegionReference.hard(1, measure=True)
    reference.bind(policy, model)
    perturb(policy, 1)
    assert reference.distance() > 0
    reference.update(1, 1)
    assert reference.distance() == 0
    with reference.as_at_first():
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), logits(policy))


@pytest.mark.parametrize("kind", ["factors", "exact"])
def test_distance_is_that_of_what_is_followed(kind: str) -> None:
    model = lora()
    reference = TrustRegionReference.soft(0.5, lora=kind)
    reference.bind(model)
    assert reference.distance() == 0
    perturb(model, 1, "default")
    if kind == "exact":
        now, then = merged(model), dict(llama(0).state_dict())
        expected = sum(float((now[name] - then[name]).square().sum()) for name in then) ** 0.5
    else:
        now = {n: t.detach() for n, t in model.named_parameters() if ".default." in n}
        then = {n: t.detach() for n, t in model.named_parameters() if ".ref." in n}
        pairs = zip(now.values(), then.values(), strict=True)
        expected = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    assert reference.distance() == pytest.approx(expected, rel=1e-4)


# -- bad input -------------------------------------------------------------------------------------


def test_a_reference_of_another_structure_is_refused() -> None:
    reference = TrustRegionReference.hard(1)
    with pytest.raises(TrimtabError, match=r"model.layers.0.mlp.gate_proj.weight' has shape \[32, 16\].*\[24, 16\]"):
        reference.bind(llama(), llama(intermediate_size=32))
    with pytest.raises(TrimtabError, match=r"the policy has no tensor 'model.layers.2"):
        reference.bind(llama(), llama(num_hidden_layers=3))
    with pytest.raises(TrimtabError, match=r"the reference has no tensor 'model.layers.1"):
        reference.bind(llama(), llama(num_hidden_layers=1))


def test_a_reference_that_is_the_policy_is_refused() -> None:
    policy = llama()
    with pytest.raises(TrimtabError, match="must be a copy"):
        TrustRegionReference.hard(1).bind(policy, policy)
    model = llama(1)
    model.model.norm.weight.data = policy.model.norm.weight.data
    with pytest.raises(TrimtabError, match=r"'model.norm.weight' is shared"):
        TrustRegionReference.hard(1).bind(policy, model)


def test_nothing_to_follow_is_refused() -> None:
    with pytest.raises(TrimtabError, match="ref_model is None"):
        TrustRegionReference.hard(1).bind(llama())
    with pytest.raises(TrimtabError, match="follows nobody yet"):
        TrustRegionReference.hard(1).update(1, 1)


def test_an_adapter_and_a_whole_reference_are_refused() -> None:
    with pytest.raises(TrimtabError, match="leave ref_model out"):
        TrustRegionReference.hard(1).bind(lora(), llama())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "AdaLoRA"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "bias='all'"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING policy"),
    ],
)
def test_adapters_without_a_second_are_refused(config: Any, named: str) -> None:
    with pytest.raises(TrimtabError, match=named):
        TrustRegionReference.hard(1).bind(get_peft_model(llama(), config))


def test_several_adapters_at_once_are_refused() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(TrimtabError, match="a reference follows one adapter"):
        TrustRegionReference.hard(1).bind(model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_exact_averages_of_other_layers_are_refused(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(tied=False), LoraConfig(r=2, **({"target_modules": ["q_proj"]} | options)))
    with pytest.raises(TrimtabError, match="plain LoRA on linear layers"):
        TrustRegionReference.soft(0.5, lora="exact").bind(model)


def test_exact_averages_of_an_adapter_that_is_no_lora_are_refused() -> None:
    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    with pytest.raises(TrimtabError, match="for a LoRA policy"):
        TrustRegionReference.soft(0.5, lora="exact").bind(get_peft_model(llama(), config))
