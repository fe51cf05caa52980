"""TRL's trainers with a reference that follows the policy: `TRDPOTrainer` in the place of `DPOTrainer`, and so on.

    reference = TrustRegionReference.hard(tau=64)
    trainer = TRDPOTrainer(model, args=DPOConfig(beta=0.3), train_dataset=pairs, reference=reference)

Loss, data and loop are TRL's. `TrustRegionMixin` before any other trainer with a reference model does the same for it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import use_adapter

from trimtab.align.adapters import REFERENCE_ADAPTER
from trimtab.align.ipo import IPOFormMixin
from trimtab.align.measures import Batch, compare, completion_log_probs
from trimtab.align.reference import FILE, TrustRegionReference
from trimtab.core.errors import TrimtabError

__all__ = ["TRDPOTrainer", "TRGRPOTrainer", "TRKTOTrainer", "TRRLOOTrainer", "TrustRegionMixin"]

_BATCH = ("input_ids", "attention_mask", "completion_mask", "prompt_ids", "prompt_mask", "completion_ids", "tool_mask")
"""What is measured, of preferences and of sampled answers."""
_DECOMPOSING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class TrustRegionMixin:
    """A TRL trainer whose reference moves.

    `reference` says when and how far; None takes TRL's own `ref_model_mixup_alpha` and `ref_model_sync_steps` of
    `args`, by default 0.6 every 512 steps. All else is as in the trainer that it is mixed into.

    The reference is saved in each checkpoint and resumed exactly; `save_model` leaves the adapter "ref" out, which
    `model.save_pretrained` would write into a folder "ref" beside the policy's. Logged beside what TRL logs:
    `reference/updates`, `reference/steps_since_update`, `reference/policy_weight` of the last update,
    `reference/log_ratio` (mean over completions of log pi - log ref, from TRL's rewards) and, with `reference.measure`,
    on the last batch: `reference/kl_current`, `kl_initial` (nats per token), `margin_current`, `margin_initial` (nats),
    `accuracy_initial`, `flips_current`, `flips_initial` and `distance`. Of an online trainer these are `kl_current` and
    `kl_initial`, estimated at the tokens of the last answers, and `distance`. See `trimtab.align.measures`.

    Raises `TrimtabError` where a reference cannot move: precomputed log-probabilities, no reference in the objective,
    models of different structure, and adapters of which there is no second one. `sync_ref_model=True`, TRL's own
    update, is switched off with a warning: `reference` wins.
    """

    def __init__(self, *args: Any, reference: TrustRegionReference | None = None, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        named = given.arguments | kwargs  # a trainer may take some by **kwargs
        settings: Any = named.get("args")
        _refuse_fixed(self, settings)
        _refuse_adapter(named.get("model"))
        if getattr(settings, "sync_ref_model", False):
            warnings.warn(
                "sync_ref_model=True is TRL's update of the reference; it is switched off, and `reference` of the "
                "trust-region trainer wins.",
                stacklevel=2,
            )
            settings = copy.copy(settings)
            settings.sync_ref_model = False
            if "args" in kwargs:
                kwargs["args"] = settings
            else:
                given.arguments["args"] = settings
                args, kwargs = given.args, given.kwargs
        super().__init__(*args, **kwargs)
        config = self.args  # type: ignore[attr-defined]
        if not hasattr(self, "ref_model"):
            raise TrimtabError(f"{type(self).__name__} has no reference model in its objective that could move.")
        self.reference = reference or TrustRegionReference.mixed(
            config.ref_model_mixup_alpha, config.ref_model_sync_steps
        )
        self._resumed_from: str | None = None
        self._margins_before = 0
        self._last_batch: Batch | None = None
        self._readings: dict[str, float] | None = None
        if self.reference.schedule.margin_threshold is not None and isinstance(self, GRPOTrainer | RLOOTrainer):
            raise TrimtabError("margin_threshold is for preference trainers (DPO, KTO): an online one has no margin.")
        _refuse_host(self)
        if self.reference.measure:
            _refuse_unmeasured(self)
        self.reference.bind(self.model, self.ref_model)  # type: ignore[attr-defined]
        self.add_callback(_Update(self))  # type: ignore[attr-defined]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        path = inspect.signature(super()._inner_training_loop).bind(*args, **kwargs).arguments  # type: ignore[misc]
        self._resumed_from = path.get("resume_from_checkpoint")
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.reference.measure and self.model.training:  # type: ignore[attr-defined]
            self._last_batch = {name: inputs[name] for name in _BATCH if name in inputs}
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a step's, and neither an evaluation's nor the run's
            logs = logs | self._reference_metrics()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the host's own files, among which the trainer's state, without which nothing is resumed, comes last.
        if not self.args.save_only_model:  # type: ignore[attr-defined]
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")  # type: ignore[attr-defined]
            if self.args.should_save:  # type: ignore[attr-defined]
                folder.mkdir(parents=True, exist_ok=True)
            self.reference.save(folder / FILE, writes=self.args.should_save)  # type: ignore[attr-defined]
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter "ref" is state of the training, and not what it made.
        adapters = getattr(self.model, "peft_config", {})  # type: ignore[attr-defined]
        hidden = adapters.pop(REFERENCE_ADAPTER, None)
        if hidden is not None:  # PEFT tells an adapter's tensors from others' by the adapters that it knows
            weights = self.model.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
            state_dict = {n: w for n, w in weights.items() if f".{REFERENCE_ADAPTER}." not in n}
        try:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        finally:
            if hidden is not None:
                adapters[REFERENCE_ADAPTER] = hidden

    def _margins(self) -> list[float]:
        """The margins of TRL's rewards in the micro-batches since its last log."""
        return getattr(self, "_metrics", {"train": {}})["train"].get("rewards/margins", [])

    def _margin(self) -> float:
        """Mean h over the step's micro-batches in nats; nan if none has pairs, or both kinds of completions."""
        margins = self._margins()[self._margins_before :]
        return sum(margins) / len(margins) / self.beta if margins else math.nan  # type: ignore[attr-defined]

    def _reference_metrics(self) -> dict[str, float | int]:
        reference, step = self.reference, self.state.global_step  # type: ignore[attr-defined]
        metrics: dict[str, float | int] = {
            "reference/updates": reference.n_updates,
            "reference/steps_since_update": step - reference.last_update,
            "reference/policy_weight": reference.last_weight,
        }
        logged = getattr(self, "_metrics", {"train": {}})["train"]
        rewards = [logged.get(f"rewards/{side}") for side in ("chosen", "rejected")]
        if all(rewards):
            metrics["reference/log_ratio"] = sum(sum(r) / len(r) for r in rewards) / 2 / self.beta  # type: ignore
        if reference.measure and self._last_batch is not None:
            metrics |= self._measured(self._last_batch) if self._readings is None else self._readings
            self._readings = None
        return metrics

    @torch.no_grad()
    def _measured(self, batch: Batch) -> dict[str, float]:
        model, reference = self.model, self.reference  # type: ignore[attr-defined]
        measured = self._of_answers if isinstance(self, GRPOTrainer | RLOOTrainer) else self._of_preferences
        model.eval()
        try:
            figures = measured(batch)
        finally:
            model.train()
            for module in model.modules():
                if isinstance(module, FSDPModule):  # put together by a forward pass, for a backward that does not come
                    module.reshard()
        return {f"reference/{name}": value for name, value in (figures | {"distance": reference.distance()}).items()}

    def _of_preferences(self, batch: Batch) -> dict[str, float]:
        policy = functools.partial(completion_log_probs, self.model)  # type: ignore[attr-defined]
        read_reference = functools.partial(self._by_reference, completion_log_probs)
        found = {"current": compare(policy, read_reference, batch)}
        with self.reference.as_at_first():
            found["initial"] = compare(policy, read_reference, batch)
        figures = {f"kl_{name}": each.mean_kl for name, each in found.items()}
        if isinstance(self, DPOTrainer):
            for name, each in found.items():
                figures |= {f"margin_{name}": each.margins.mean(), f"flips_{name}": each.flips}
            figures["accuracy_initial"] = (found["initial"].margins > 0).float().mean()
        return {name: self.accelerator.gather(value).mean().item() for name, value in figures.items()}  # type: ignore[attr-defined]

    def _of_answers(self, batch: Batch) -> dict[str, float]:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)

        def log_probs(model: Any) -> Tensor:
            return self._get_per_token_logps_and_entropies(model, ids, attended, batch["completion_ids"].shape[1])[0]  # type: ignore[attr-defined]

        policy, found = log_probs(self.model), {"kl_current": self._by_reference(log_probs)}  # type: ignore[attr-defined]
        with self.reference.as_at_first():
            found["kl_initial"] = self._by_reference(log_probs)
        figures = {}
        for name, by_reference in found.items():
            d = by_reference - policy
            per_token = -d if isinstance(self, RLOOTrainer) else d.exp() - d - 1
            total, count = self.accelerator.reduce(torch.stack([(per_token * mask).sum(), mask.sum().float()]))  # type: ignore[attr-defined]
            figures[name] = (total / count.clamp(min=1)).item()
        return figures

    def _by_reference(self, read: Callable[..., Tensor], *given: Any) -> Tensor:
        """read(the current reference, *given)."""
        if self.ref_model is not None:  # type: ignore[attr-defined]
            return read(self.ref_model, *given)  # type: ignore[attr-defined]
        with use_adapter(self.accelerator.unwrap_model(self.model), REFERENCE_ADAPTER):  # type: ignore[attr-defined]
            return read(self.model, *given)  # type: ignore[attr-defined]


class TRDPOTrainer(IPOFormMixin, TrustRegionMixin, DPOTrainer):
    """TRL's `DPOTrainer`, of every loss that looks at the reference (TR-DPO, TR-IPO).

    `ipo_form`: "means" over tokens, as TRL has IPO, or "sums", as its paper has it (see `trimtab.align.ipo`).
    """


class TRKTOTrainer(TrustRegionMixin, KTOTrainer):
    """TRL's `KTOTrainer` (TR-KTO)."""


class TRGRPOTrainer(TrustRegionMixin, GRPOTrainer):
    """TRL's `GRPOTrainer`, whose KL term (beta > 0) is to the moving reference."""


class TRRLOOTrainer(TrustRegionMixin, RLOOTrainer):
    """TRL's `RLOOTrainer`, whose KL term (beta > 0) is to the moving reference."""


class _Update(TrainerCallback):
    """Moves a trainer's reference after each optimiser step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reference = self.trainer.reference
        reference.restart()
        if self.trainer._resumed_from is not None:
            reference.load(Path(self.trainer._resumed_from, FILE))
        if reference.schedule.moves and not reference.schedule.updates(state.max_steps):
            warnings.warn(
                f"The reference never moves: its first update would come after step "
                f"{reference.schedule.interval(state.max_steps)}, and the run has {state.max_steps}.",
                stacklevel=2,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._margins_before = len(self.trainer._margins())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.reference.measure and control.should_log and trainer._last_batch is not None:
            # Before the reference moves: of the one that the step's loss had.
            trainer._readings = trainer._measured(trainer._last_batch)
        trainer.reference.update(state.global_step, state.max_steps, trainer._margin())


def _refuse_fixed(trainer: Any, settings: Any) -> None:
    """Refuse settings under which the objective has no reference, or one that cannot move."""
    default = GRPOConfig if isinstance(trainer, GRPOTrainer) else RLOOConfig
    if isinstance(trainer, GRPOTrainer | RLOOTrainer) and (settings or default).beta == 0:
        raise TrimtabError("beta=0.0: the objective has no KL term, so there is no reference. Set beta above 0.")
    if getattr(settings, "precompute_ref_log_probs", False):
        raise TrimtabError(
            "precompute_ref_log_probs=True computes the reference's log-probabilities once, before training, and a "
            "trust region's reference moves: set it to False."
        )
    losses = getattr(settings, "loss_type", None)
    if losses in ("sft", ["sft"]):
        raise TrimtabError(f"loss_type={losses!r} never looks at the reference: add a preference loss.")


def _refuse_adapter(model: Any) -> None:
    """Refuse a PeftModel on which TRL, which copies its adapter before we see it, would fail or change the base."""
    configs = getattr(model, "peft_config", {})
    if REFERENCE_ADAPTER in configs:
        raise TrimtabError(
            'The model has an adapter "ref" already, of an earlier run: call model.delete_adapter("ref").'
        )
    if configs and list(model.active_adapters) != ["default"]:
        raise TrimtabError(
            f"The active adapters are {list(model.active_adapters)}: TRL takes the policy's to be named 'default', and "
            "begins the reference as a copy of that one; accepted: 'default', or the base model with peft_config."
        )
    for config in configs.values():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_DECOMPOSING):
            raise TrimtabError(
                f"init_lora_weights={init!r} takes the adapter out of the base's weights, and TRL's copy of the "
                "adapter would do so again: give the trainer the base model and peft_config."
            )


def _refuse_host(trainer: Any) -> None:
    """Refuse an adapter's reference where the host would not read it, or its tensors are parts of one."""
    if not hasattr(trainer.model, "peft_config"):
        return
    if not isinstance(trainer, DPOTrainer | KTOTrainer | GRPOTrainer | RLOOTrainer):
        raise TrimtabError(
            f"{type(trainer).__name__} is not known to compute its reference with the adapter {REFERENCE_ADAPTER!r}: "
            "train it without PEFT."
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise TrimtabError("fsdp_version=1 puts all adapters into one tensor: set fsdp_version to 2.")


def _refuse_unmeasured(trainer: Any) -> None:
    if not isinstance(trainer, DPOTrainer | KTOTrainer | GRPOTrainer | RLOOTrainer):
        kind = type(trainer).__name__
        raise TrimtabError(f"measure=True does not know the batches of {kind}; accepted: DPO, KTO, GRPO, RLOO.")
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if getattr(trainer, "_is_vision_dataset", False) or {"image", "images"} & set(columns):
        raise TrimtabError("measure=True reads text alone, and this data set has images.")
    if trainer.is_fsdp_enabled and hasattr(trainer.model, "peft_config"):
        raise TrimtabError("measure=True copies the first adapter before FSDP shards it: not for PEFT under FSDP.")
    if trainer.is_deepspeed_enabled:
        raise TrimtabError("measure=True swaps the initial reference in, which DeepSpeed's partitions do not allow.")
