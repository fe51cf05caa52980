"""The reference of a PEFT policy: a second adapter beside the policy's, on one frozen base.

TRL computes the reference's log-probabilities with the adapter called "ref" where there is one. With W the frozen
weight, A and B an adapter's factors and s its scaling, an adapted layer is W + s B A, and an update in weight space is

    Delta_ref <- alpha s B A + (1 - alpha) Delta_ref                                                        "exact"
    A_ref <- alpha A + (1 - alpha) A_ref,    B_ref <- alpha B + (1 - alpha) B_ref                           "factors"

The two are one at alpha = 1, where factors are copied. Else the second is an approximation: the product of two
averages has cross terms. In the first each update adds the rank of another moment's factors, so that Delta_ref is a
dense float32 matrix of the adapted weight's size, added in the reference's forward pass alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from trimtab.align.weights import Pair, named_tensors, pairs_by_name
from trimtab.core.errors import TrimtabError

__all__ = ["REFERENCE_ADAPTER", "DenseDelta", "adapter_pairs", "add_reference_adapter", "dense_deltas"]

REFERENCE_ADAPTER = "ref"
"""The name by which TRL's trainers know a reference adapter."""


def add_reference_adapter(model: Any) -> str:
    """Give a PeftModel the adapter "ref", a copy of its active one, unless it is there; the active one's name.

    A "ref" that an earlier run left with a dense average begins anew as a copy.

    Raises `TrimtabError` for adapters of which a second one is no reference: prompt learning, AdaLoRA, trained biases
    of the base, and several at once.
    """
    active = [name for name in model.active_adapters if name != REFERENCE_ADAPTER]
    if len(active) != 1:
        raise TrimtabError(f"The active adapters are {model.active_adapters}: a reference follows one adapter.")
    policy, config = active[0], model.peft_config[active[0]]
    kind = config.peft_type.value
    if config.is_prompt_learning:
        raise TrimtabError(f"A {kind} policy has no weights in the layers that a reference could follow: use LoRA.")
    if kind == "ADALORA":
        raise TrimtabError("An AdaLoRA policy prunes ranks of its own adapter, which a reference cannot follow.")
    if getattr(config, "bias", "none") != "none":
        raise TrimtabError(f"bias={config.bias!r} trains the base's biases, which the reference shares: use 'none'.")
    is_new = REFERENCE_ADAPTER not in model.peft_config
    if is_new:
        config = copy.deepcopy(config)
        if hasattr(config, "init_lora_weights"):
            # PiSSA, OLoRA and their like take what an adapter begins with out of the base's weights, which is done.
            config.init_lora_weights = True
        # A fixed reference makes no draws, and runs with and without an update must see the same ones.
        with torch.random.fork_rng():
            model.add_adapter(REFERENCE_ADAPTER, config)
    if _forget_dense_deltas(model) or is_new:
        for pair in adapter_pairs(model, policy):
            pair.reference.data = pair.policy.detach().clone()
    for pair in adapter_pairs(model, policy):
        pair.reference.requires_grad_(False)
    for module in model.modules():
        # A reference has no dropout: TRL switches it off before this adapter is there, or not at all.
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.ModuleDict) and REFERENCE_ADAPTER in dropout:
            dropout[REFERENCE_ADAPTER] = nn.Identity()
    return policy


def adapter_pairs(model: nn.Module, policy: str) -> list[Pair]:
    """The tensors of "ref" and of the adapter `policy`, `modules_to_save` included."""
    by_adapter: dict[str, dict[str, Tensor]] = {REFERENCE_ADAPTER: {}, policy: {}}
    for name, tensor in named_tensors(model).items():
        parts = name.split(".")
        for adapter, tensors in by_adapter.items():
            if adapter in parts:
                tensors[".".join(part for part in parts if part != adapter)] = tensor
    return pairs_by_name(by_adapter[REFERENCE_ADAPTER], by_adapter[policy])


class DenseDelta:
    """Delta_ref of one adapted layer, added to the layer's output while "ref" is its active adapter."""

    def __init__(self, name: str, layer: Any, policy: str) -> None:
        self.name, self.layer, self.policy = name, layer, policy
        B, A, scale = self._factors(REFERENCE_ADAPTER)
        self.value = (scale * B @ A).detach()
        # The adapter "ref" itself then adds nothing.
        layer.lora_B[REFERENCE_ADAPTER].weight.data.zero_()
        layer.register_forward_hook(self._add)

    @torch.no_grad()
    def move(self, policy_weight: float) -> None:
        """Delta_ref <- alpha s B A + (1 - alpha) Delta_ref."""
        B, A, scale = self._factors(self.policy)
        self.value = self.value.to(B.device)
        torch.addmm(self.value, B, A, beta=1 - policy_weight, alpha=policy_weight * scale, out=self.value)

    @torch.no_grad()
    def distance_squared(self) -> float:
        """|s B A - Delta_ref|^2."""
        B, A, scale = self._factors(self.policy)
        return float((scale * B @ A - self.value).square().sum())

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        B, A = (factor[adapter].weight for factor in (layer.lora_B, layer.lora_A))
        # The average is whole on each process, and the factors of a sharded policy are small.
        B, A = (factor.full_tensor() if isinstance(factor, DTensor) else factor for factor in (B, A))
        return B.float(), A.float(), layer.scaling[adapter]

    def _add(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if layer.disable_adapters or list(layer.active_adapters) != [REFERENCE_ADAPTER]:
            return output
        self.value = self.value.to(output.device)  # a model may be moved after this was made
        return output + linear(inputs[0].to(self.value.dtype), self.value).to(output.dtype)


def dense_deltas(model: nn.Module, policy: str) -> list[DenseDelta]:
    """One for each layer that the LoRA adapter `policy` adapts.

    Raises `TrimtabError` for adapters that are not plain LoRA on linear layers.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    deltas = []
    for name, layer in model.named_modules():
        if not (isinstance(layer, LoraLayer) and policy in layer.scaling):
            continue
        linear_factors = policy in layer.lora_A and isinstance(layer.lora_A[policy], nn.Linear)
        if (
            isinstance(layer, ParamWrapper)
            or not linear_factors
            or policy in layer.lora_variant
            or layer.lora_bias.get(policy, False)
        ):
            raise TrimtabError(f"lora='exact' is for plain LoRA on linear layers, and {name!r} is another: 'factors'.")
        deltas.append(DenseDelta(name, layer, policy))
    if not deltas:
        raise TrimtabError("lora='exact' is for a LoRA policy, and this adapter is none: use lora='factors'.")
    return deltas


def _forget_dense_deltas(model: nn.Module) -> bool:
    """Take off the dense averages of an earlier run; whether there were any."""
    found = False
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), DenseDelta):
                del module._forward_hooks[key]
                found = True
    return found
