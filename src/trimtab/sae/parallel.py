"""How processes share a training run: tokens among some, the latents of each dictionary among others.

The processes form a mesh [data, shard]. Those of one row, a *group*, hold a dictionary together: process s of S has the
latents s F/S … (s + 1) F/S - 1 with their encoder and decoder rows, gradients and moments; the decoder's bias is with
all. They work on the same tokens, gathered from all of them; the groups work on different tokens.

    latents             each process finds the k largest of its own; of those S k, gathered, the k largest count
    x_hat               b_D + the sum over the group of what each process's latents add
    prefixes            need a token's decoder rows in order: a block's rows are summed over the group, each from its
                        owner, so that K d numbers a token travel instead of d
    BatchTopK           the largest latents of all tokens of all processes
    dL/dE, dL/dD        of a process's own latents; they are averaged over the groups, as every gradient

Nothing of size F is ever gathered but for files: there DTensor puts the pieces together and cuts them. `ALONE` is one
process, whose every method gives back what it is given.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.encodings import Latents

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "Processes", "mesh"]

NAMES = ("data", "shard")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; `device_mesh` has the dimensions "data" and "shard", None for one process.

    All methods are collective: every process calls them in the same order.
    """

    device_mesh: DeviceMesh | None = None

    @property
    def world(self) -> int:
        return self.groups * self.shards

    @property
    def groups(self) -> int:
        """Groups that work on different tokens."""
        return self._size("data")

    @property
    def shards(self) -> int:
        """Processes that hold a dictionary together."""
        return self._size("shard")

    @functools.cached_property
    def shard(self) -> int:
        """Which of them this is."""
        return self._index("shard")

    @property
    def first(self) -> bool:
        """Whether this is the first process of all, which writes the files."""
        return not (self._index("data") or self.shard)

    # -- sums and means ----------------------------------------------------------------------------

    def sum_of_shards(self, tensor: Tensor) -> Tensor:
        """The sum over the group, in place."""
        return self._reduced(tensor, "shard", dist.ReduceOp.SUM)

    def mean_of_groups(self, tensor: Tensor) -> Tensor:
        """The mean over the groups, in place."""
        return self._reduced(tensor, "data", dist.ReduceOp.SUM).div_(self.groups) if self.groups > 1 else tensor

    def sum_of_groups(self, tensor: Tensor) -> Tensor:
        """The sum over the groups, in place."""
        return self._reduced(tensor, "data", dist.ReduceOp.SUM)

    def smallest(self, tensor: Tensor) -> Tensor:
        """The smallest over all processes, in place."""
        return self._reduced(self._reduced(tensor, "shard", dist.ReduceOp.MIN), "data", dist.ReduceOp.MIN)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, in place."""
        return self._reduced(self._reduced(tensor, "shard", dist.ReduceOp.MAX), "data", dist.ReduceOp.MAX)

    def gathered(self, tensor: Tensor, dim: int = 0, name: str = "shard") -> Tensor:
        """The tensors of the group (or of a column of the mesh, "data"), in order along `dim`; all of one shape."""
        if self._size(name) == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self._size(name))]
        dist.all_gather(parts, tensor.contiguous(), group=self._group(name))
        return torch.cat(parts, dim)

    def of_everyone(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """The vectors of all processes, one after the other, and where this one's is; all of one length."""
        found = self.gathered(self.gathered(tensor), name="data")
        mine = (self._index("data") * self.shards + self.shard) * len(tensor)
        return found, slice(mine, mine + len(tensor))

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place; all of one shape."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def from_first_group(self, tensor: Tensor) -> Tensor:
        """The tensor of this process's like in the first group, in place."""
        if self.groups > 1:
            dist.broadcast(tensor, group=self._group("data"), group_src=0)
        return tensor

    # -- latents -----------------------------------------------------------------------------------

    def together(self, latents: Latents, n_latents: int, k: int) -> tuple[Latents, Tensor | None]:
        """The group's latents of each token, by falling value, at least k slots; and where this process's stand there.

        n_latents: of this process. The indices count through the whole dictionary. The second is [tokens, slots of
        `latents`], None for a dictionary that is not shared.
        """
        if self.shards == 1:
            return latents, None
        values = self.even(latents.values)
        width = values.shape[1]
        indices = F.pad(latents.indices, (0, width - latents.indices.shape[1])) + self.shard * n_latents
        values, indices = self.gathered(values, -1), self.gathered(indices, -1)
        values = F.pad(values, (0, max(k - values.shape[1], 0)))
        indices = F.pad(indices, (0, max(k - indices.shape[1], 0)))
        values, order = values.sort(dim=-1, descending=True, stable=True)
        slots = max(k, int((values > 0).sum(-1).max()))
        places = order.argsort(-1)  # of each slot, after sorting
        first = self.shard * width
        mine = places[:, first : first + latents.values.shape[1]]
        return Latents(values[:, :slots], indices.gather(1, order)[:, :slots]), mine.clamp_max(slots - 1)

    def rows(self, weight: Float[Tensor, "own d"], index: Int[Tensor, " n"], out: Float[Tensor, "n d"]) -> None:
        """`out` = rows `index` of the whole dictionary's weight, each from the process that has it."""
        local, mine = index, None
        if self.shards > 1:
            local, mine = self.own(index, out.new_ones(len(index)), len(weight))
        if weight.dtype == out.dtype:
            torch.index_select(weight, 0, local, out=out)
        else:
            out.copy_(weight[local])
        if mine is not None:
            self.sum_of_shards(out.mul_(mine[:, None]))

    def own(self, index: Int[Tensor, "*any"], values: Float[Tensor, "*any"], n_latents: int) -> tuple[Tensor, Tensor]:
        """Latents of the whole dictionary as this process numbers its `n_latents`; those of others get the value 0."""
        if self.shards == 1:
            return index, values
        local = index - self.shard * n_latents
        mine = (local >= 0) & (local < n_latents)
        return local.where(mine, 0), values * mine

    # -- placement ---------------------------------------------------------------------------------

    def split(self, tensor: Tensor, blocks: int = 1) -> Tensor:
        """This process's rows of `tensor` [blocks x rows, …], an equal share of each of the blocks."""
        if self.shards == 1:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        parts = tensor.unflatten(0, (blocks, -1))
        placed = distribute_tensor(parts, self._shards_mesh(), [_cut()], src_data_rank=None)
        return placed.to_local().flatten(0, 1)

    def whole(self, tensor: Tensor, blocks: int = 1) -> Tensor:
        """What `split` cut, put together again, on every process."""
        if self.shards == 1:
            return tensor
        from torch.distributed.tensor import DTensor

        parts = tensor.detach().unflatten(0, (blocks, -1)).contiguous()
        return DTensor.from_local(parts, self._shards_mesh(), [_cut()]).full_tensor().flatten(0, 1)

    def whole_for_the_first(self, tensor: Tensor, blocks: int = 1) -> Tensor:
        """`whole`, on the CPU of the first process; the others get nothing of it to keep."""
        if self.shards == 1:
            return tensor
        found = self.whole(tensor, blocks)
        return found.cpu() if self.first else found.new_empty(0)

    # ----------------------------------------------------------------------------------------------

    def even(self, values: Tensor) -> Tensor:
        """`values` with as many columns of zeros as make the group's equally wide."""
        if self.shards == 1:
            return values
        widest = self._reduced(torch.tensor(values.shape[1], device=values.device), "shard", dist.ReduceOp.MAX)
        return F.pad(values, (0, int(widest) - values.shape[1]))

    def _reduced(self, tensor: Tensor, name: str, how: Any) -> Tensor:
        if self._size(name) > 1:
            dist.all_reduce(tensor, how, group=self._group(name))
        return tensor

    def _size(self, name: str) -> int:
        return self._sizes.get(name, 1)

    def _group(self, name: str) -> Any:
        return self._groups[name]

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return {} if self.device_mesh is None else {name: self.device_mesh[name].size() for name in NAMES}

    @functools.cached_property
    def _groups(self) -> dict[str, Any]:
        assert self.device_mesh is not None
        return {name: self.device_mesh.get_group(name) for name in NAMES}

    def _index(self, name: str) -> int:
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(name)

    def _shards_mesh(self) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh["shard"]


ALONE = Processes()


def mesh(world: int, shards: int, device: str) -> Processes:
    """This one of `world` processes in groups of `shards`. Raises TrimtabError where they do not fit."""
    if world % shards:
        raise TrimtabError(f"tensor_parallel={shards} does not divide the {world} processes of this run")
    if world == 1:
        return ALONE
    from torch.distributed.device_mesh import init_device_mesh

    return Processes(init_device_mesh(device, (world // shards, shards), mesh_dim_names=NAMES))


def _cut() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1)
