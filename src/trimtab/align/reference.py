"""A reference policy that follows the trained one: trust-region alignment (TR-DPO, TR-IPO, TR-KTO).

Source: "Learn Your Reference Model for Real Good Alignment", arXiv 2404.09656. The losses stay as they are, and the
reference moves after an optimiser step (`trimtab.align.schedule`):

    theta_ref <- alpha theta + (1 - alpha) theta_ref

What moves depends on the policy: all of a second model's weights, whole or in shards; or, of a PEFT policy, a second
adapter (`trimtab.align.adapters`). A reference in bfloat16 or float16 with alpha < 1 has a float32 master, since what
one step adds is below half of bfloat16's spacing.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trimtab.align.adapters import DenseDelta, adapter_pairs, add_reference_adapter, dense_deltas
from trimtab.align.functional import trust_region_lerp_
from trimtab.align.schedule import UpdateSchedule
from trimtab.align.weights import Pair, full_shape, gathered, local_pair, named_tensors, pairs_by_name, whole, write
from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.files import write_file

__all__ = ["FILE", "TrustRegionReference"]

FILE = "trust_region_reference.safetensors"
"""What a checkpoint holds of the reference."""

_HALVES = (torch.float16, torch.bfloat16)
_KINDS = ("factors", "exact")
_COUNTS = ("n_updates", "last_update", "last_weight")


class TrustRegionReference:
    """A reference that moves by `schedule`; a trainer of `trimtab.align` binds it to its models.

    - `lora`: how the reference of a LoRA policy is averaged where alpha < 1: "factors" averages A and B, an
      approximation that costs nothing; "exact" averages their product, at the memory of the adapted weights in
      float32. Other policies have one way.
    - `measure`: also measure the KL divergence from the current and from the initial reference when the trainer
      logs. It takes three or four forward passes at each log, and a copy of the initial reference.

    Presets: `soft(alpha)`, `hard(tau)`, `mixed(alpha, tau)`, `every(fraction)`.

    In a loop of one's own: `bind(policy, reference_model)` once, and `update(step, total_steps)` after each optimiser
    step. Raises `TrimtabError` for an unknown `lora`.
    """

    def __init__(self, schedule: UpdateSchedule, *, lora: str = "factors", measure: bool = False) -> None:
        if lora not in _KINDS:
            raise unknown("lora", lora, _KINDS)
        self.schedule = schedule
        self.lora = lora
        self.measure = measure
        self.n_updates = 0
        self.last_update = 0
        self.last_weight = 0.0
        self._policy: Any = None
        self._model: Any = None
        self._adapter: str | None = None
        self._deltas: list[DenseDelta] = []
        self._masters: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] = {}

    @classmethod
    def soft(cls, alpha: float | int = 0.6, **options: Any) -> TrustRegionReference:
        """A weighted average after every step. At alpha = 0.6 it lags the policy by 0.67 steps: hardly an anchor."""
        return cls(UpdateSchedule(alpha=alpha, tau=1), **options)

    @classmethod
    def hard(cls, tau: int = 512, **options: Any) -> TrustRegionReference:
        """A copy every `tau` steps."""
        return cls(UpdateSchedule(alpha=1.0, tau=tau), **options)

    @classmethod
    def mixed(cls, alpha: float | int = 0.6, tau: int = 512, **options: Any) -> TrustRegionReference:
        """A weighted average every `tau` steps: TRL's form and defaults."""
        return cls(UpdateSchedule(alpha=alpha, tau=tau), **options)

    @classmethod
    def every(cls, fraction: float | int, alpha: float | int = 1.0, **options: Any) -> TrustRegionReference:
        """An update every `fraction` of the run, such as 0.1."""
        return cls(UpdateSchedule(alpha=alpha, tau=None, fraction=fraction), **options)

    # -- the models --------------------------------------------------------------------------------

    def bind(self, policy: Any, reference_model: Any = None) -> None:
        """Follow `policy`: by `reference_model`, a model of its structure, or by an adapter "ref" of a PeftModel.

        The reference takes no gradient and is in evaluation mode. Raises `TrimtabError` when the structures differ,
        when there is nothing that could be moved, and for adapters that cannot be followed.
        """
        is_peft = isinstance(policy, _peft_model())
        if is_peft and reference_model is not None:
            raise TrimtabError(
                "A PEFT policy's reference is a second adapter on its own base: leave ref_model out. To follow a whole "
                "model, merge the adapter and train without PEFT."
            )
        if not is_peft and reference_model is None:
            raise TrimtabError("There is no reference model that could follow the policy: ref_model is None.")
        self.restart()
        self._policy, self._model, self._adapter = policy, reference_model, None
        self._deltas, self._masters, self._initial = [], {}, {}
        if is_peft:
            if self.lora == "exact" and any(hasattr(weight, "ds_id") for weight in policy.parameters()):
                raise TrimtabError(
                    "lora='exact' reads whole factors, which DeepSpeed's ZeRO-3 holds in parts: 'factors'."
                )
            self._adapter = add_reference_adapter(policy)
            averaged = self.schedule.averages
            if averaged and self.lora == "exact":
                self._deltas = dense_deltas(policy, self._adapter)
            elif averaged:
                warnings.warn(
                    f"alpha={self.schedule.alpha}: averaging LoRA's factors only approximates averaging the weights, "
                    "since a product of averages has cross terms; lora='exact' does not.",
                    stacklevel=2,
                )
        else:
            reference_model.requires_grad_(False).eval()
            pairs_by_name(named_tensors(reference_model), named_tensors(policy))
        if self.measure:
            self._initial = {name: tensor.detach().clone() for name, tensor in self._held().items()}

    def restart(self) -> None:
        """Count updates anew, as at the beginning of a run."""
        self.n_updates, self.last_update, self.last_weight = 0, 0, 0.0

    @property
    def n_tensors(self) -> int:
        """How many tensors an update writes."""
        return len(self._pairs()) + len(self._deltas)

    # -- moving ------------------------------------------------------------------------------------

    def update(self, step: int, total_steps: int, margin: float | int = math.inf) -> bool:
        """Move after optimiser step `step` = 1, 2, … of `total_steps` if the schedule says so; whether it did.

        `margin` is the batch's mean h, for a schedule with a threshold.
        """
        weight = self.schedule.policy_weight(step, total_steps, margin)
        if not weight:
            return False
        self._move(weight)
        self.n_updates, self.last_update, self.last_weight = self.n_updates + 1, step, weight
        return True

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        for delta in self._deltas:
            delta.move(weight)
        pairs = self._pairs()
        if any(hasattr(pair.policy, "ds_id") for pair in pairs):
            for pair in pairs:
                with gathered(pair[1:]) as mine:
                    if mine:
                        self._average([pair], weight)
        else:
            self._average(pairs, weight)
        if weight == 1 and self._model is not None:
            buffers = named_tensors(self._model, buffers=True), named_tensors(self._policy, buffers=True)
            for _, ours, theirs in pairs_by_name(*buffers):
                ours.copy_(theirs)

    def _average(self, pairs: list[Pair], weight: float) -> None:
        halves = [pair for pair in pairs if weight < 1 and pair.reference.dtype in _HALVES]
        for name, ours, _ in halves:
            self._masters.setdefault(name, ours.float())
        targets = [pair._replace(reference=self._masters.get(pair.name, pair.reference)) for pair in pairs]
        local = [local_pair(pair) for pair in targets]
        trust_region_lerp_([pair.reference for pair in local], [pair.policy for pair in local], weight)
        for name, ours, _ in halves:
            ours.copy_(self._masters[name])

    def _pairs(self) -> list[Pair]:
        if self._policy is None:
            raise TrimtabError("The reference follows nobody yet: call bind, or give it to a trainer of trimtab.align.")
        if self._adapter is None:
            return pairs_by_name(named_tensors(self._model), named_tensors(self._policy))
        pairs = adapter_pairs(self._policy, self._adapter)
        dense = {f"{delta.name}.{factor}.weight" for delta in self._deltas for factor in ("lora_A", "lora_B")}
        return [pair for pair in pairs if pair.name not in dense]

    # -- keeping -----------------------------------------------------------------------------------

    def save(self, path: str | Path, *, writes: bool = True) -> None:
        """Write the reference and its count of updates to `path`; every process of a run calls it, one `writes`."""
        tensors = {}
        for name, tensor in self._held().items():
            value = whole(tensor, keep=writes)  # by every process, though one alone may have the master
            if name in self._masters:
                value = whole(self._masters[name], keep=writes)
            if value is not None:
                tensors[name] = value
        if writes:
            counts = {name: str(getattr(self, name)) for name in _COUNTS}
            write_file(Path(path), to_bytes(tensors, counts))

    def load(self, path: str | Path) -> None:
        """Go on from what `save` wrote.

        Raises `TrimtabError` if there is no such file, it is damaged, or of another model.
        """
        held = self._held()
        self._masters = {}
        try:
            with safe_open(path, "pt") as file:
                names, counts = set(file.keys()), file.metadata() or {}
                if not set(counts) >= set(_COUNTS):
                    raise TrimtabError(f"{path} is no reference that TrustRegionReference saved: it has no counts.")
                if names != set(held):
                    first = min(names ^ set(held))
                    raise TrimtabError(f"{path} is no reference of this policy: {first!r} is in one of them alone.")
                for name, tensor in held.items():
                    value = file.get_tensor(name)
                    if list(value.shape) != full_shape(tensor):
                        shapes = f"{list(value.shape)} there and {full_shape(tensor)} here"
                        raise TrimtabError(f"{path} is no reference of this policy: {name!r} has shape {shapes}.")
                    write(tensor, value)
                    if tensor.dtype in _HALVES and value.dtype == torch.float32:
                        with gathered([tensor]) as mine:
                            if mine:
                                self._masters[name] = tensor.float()
                                write(self._masters[name], value)
        except FileNotFoundError as error:
            raise TrimtabError(
                f"{path} is missing: the checkpoint holds no reference that moved, and to begin anew from the initial "
                "one would be another run. Resume from a checkpoint of a trust-region trainer."
            ) from error
        except SafetensorError as error:
            raise TrimtabError(f"{path} cannot be read: {error}") from error
        self.n_updates, self.last_update = int(counts["n_updates"]), int(counts["last_update"])
        self.last_weight = float(counts["last_weight"])

    @contextlib.contextmanager
    def as_at_first(self) -> Iterator[None]:
        """The initial reference in the place of the current one, which comes back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the current reference and the initial one, at the memory of one tensor."""
        for name, tensor in self._held().items():
            current = tensor.clone()
            tensor.copy_(self._initial[name])
            self._initial[name].copy_(current)

    @torch.no_grad()
    def distance(self) -> float:
        """|theta - theta_ref| over all that the policy trains; with shards, every process takes part."""
        total = sum(delta.distance_squared() for delta in self._deltas)
        for pair in self._pairs():
            local_pair(pair)  # else shards of two layouts would be sent around
            squares = (pair.reference.float() - pair.policy.float()).square().sum()
            total += float(squares.full_tensor() if isinstance(squares, DTensor) else squares)
        return math.sqrt(total)

    def _held(self) -> dict[str, Tensor]:
        """All that is the reference's own, by name."""
        return {pair.name: pair.reference for pair in self._pairs()} | {d.name: d.value for d in self._deltas}


def _peft_model() -> type[nn.Module]:
    from peft import PeftModel

    return PeftModel
