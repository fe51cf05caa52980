"""Two models' tensors, paired by name: whole, or shards of one layout.

A reference is paired with its policy by the names of parameters without the parts that wrappers put in (DDP, FSDP,
torch.compile, a DeepSpeed engine); tied weights are one parameter, and appear once.

Shards of FSDP2 (`DTensor`s) are updated where they lie: two of one mesh and placement hold the same rows, so that
nothing is gathered. DeepSpeed's ZeRO-3 has no such view of a parameter: both are gathered, pair by pair, and the first
process writes. That path is tested on a stand-in for DeepSpeed, and has not been run with DeepSpeed itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab.core.errors import TrimtabError

__all__ = ["Pair", "full_shape", "gathered", "local_pair", "named_tensors", "pairs_by_name", "whole", "write"]

_WRAPPERS = {"module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


class Pair(NamedTuple):
    """A reference's tensor and the policy's of the same name."""

    name: str
    reference: Tensor
    policy: Tensor


def named_tensors(module: nn.Module, *, buffers: bool = False) -> dict[str, Tensor]:
    """Parameters, or buffers, by their names without wrappers; tied ones once."""
    named = module.named_buffers() if buffers else module.named_parameters()
    return {".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor for name, tensor in named}


def pairs_by_name(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> list[Pair]:
    """The pairs, in the reference's order.

    Raises `TrimtabError`, with the first name, where one lacks a tensor or shapes differ.
    """
    for name in [*reference, *policy]:
        if name not in reference or name not in policy:
            where = "policy" if name in reference else "reference"
            raise TrimtabError(f"The reference's structure is not the policy's: the {where} has no tensor {name!r}.")
    pairs = [Pair(name, tensor, policy[name]) for name, tensor in reference.items()]
    for name, ours, theirs in pairs:
        if full_shape(ours) != full_shape(theirs):
            raise TrimtabError(
                f"Tensor {name!r} has shape {full_shape(ours)} in the reference and {full_shape(theirs)} in the policy."
            )
        if ours is theirs or _address(ours) == _address(theirs) != 0:
            raise TrimtabError(f"Tensor {name!r} is shared by reference and policy: the reference must be a copy.")
    return pairs


def local_pair(pair: Pair) -> Pair:
    """The pair's shards on this process; plain tensors as they are.

    Raises `TrimtabError` where one is sharded otherwise than the other.
    """
    name, ours, theirs = pair
    sharded = [isinstance(tensor, DTensor) for tensor in (ours, theirs)]
    if not any(sharded):
        return pair
    if not all(sharded) or ours.device_mesh != theirs.device_mesh or ours.placements != theirs.placements:  # type: ignore[attr-defined]
        layouts = " and ".join(_layout(tensor) for tensor in (ours, theirs))
        raise TrimtabError(f"Tensor {name!r} is {layouts} in reference and policy: shard both in the same way.")
    return Pair(name, ours.to_local(), theirs.to_local())  # type: ignore[attr-defined]


def _is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameter."""
    return hasattr(tensor, "ds_id")


@contextlib.contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Have ZeRO-3's parameters whole; whether this process is to write, of which the others then learn."""
    partitioned = [tensor for tensor in tensors if _is_partitioned(tensor)]
    if not partitioned:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor | None:
    """The tensor on the CPU, gathered if it is sharded; every process takes part, and has it if it is to `keep` it."""
    with gathered([tensor]):
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return value.detach().to("cpu", copy=True).contiguous() if keep else None


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into `tensor`: of a shard, its own part."""
    with gathered([tensor]) as mine:
        if isinstance(tensor, DTensor):
            # Every process has the value at hand, so that nothing is sent.
            value = value.to(tensor.device, tensor.dtype)
            part = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(part.to_local())
        elif mine:
            tensor.copy_(value)


def full_shape(tensor: Tensor) -> list[int]:
    """The shape of the whole tensor, of which this process may hold a part."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _address(tensor: Tensor) -> int:
    """Where this process holds the tensor; 0 if it holds nothing of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> str:
    return f"sharded as {tensor.placements}" if isinstance(tensor, DTensor) else "whole"
