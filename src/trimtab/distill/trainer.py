"""On-policy distillation in TRL, with rollouts that lean on the teacher at first.

Source: trust-region behaviour blending (TRB), arXiv 2605.31159.

Symbols: p the student, q the teacher, mu who writes, k the optimiser step (`state.global_step`, from 0):

    rollouts   a ~ mu,  mu = argmin KL(mu || q)  subject to  KL(mu || p) <= eps_k,     eps_k = eps_0 max(0, 1 - k/K)
    loss       mean over written tokens, up to and including the stop, of KL(p || q) at their prefixes

Where eps_k is 0, and in evaluation, the student writes by TRL's own method. The loss is TRL's own too, but for
truncated estimators, for models that stop at different ids, and for heads of different sizes.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from trimtab.core.errors import TrimtabError
from trimtab.distill.compatibility import (
    check_comparison,
    common_tokens,
    differ_in_size,
    own_config,
    teachers_tokenizer,
)
from trimtab.distill.decoder import TeacherDecoder
from trimtab.distill.eos import StopIds, suppressed_ids
from trimtab.distill.loss import Comparison, Head, reverse_kl_of_hidden, reverse_kl_of_statistics, teacher_view
from trimtab.distill.metrics import RolloutMetrics
from trimtab.distill.processor import TeacherGuided, generate_guided, plain_sampling
from trimtab.distill.prompts import InEpochs
from trimtab.distill.rollouts import RolloutPolicy, TrustRegion
from trimtab.methods import bibtex, find

__all__ = ["TRBTrainer"]

logger = get_logger(__name__)

# Settings of generation that mask what the loss does not.
_MASKING = (
    "suppress_tokens",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


class TRBTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` whose first rollouts are written by a `RolloutPolicy`, which may ask the teacher.

    All arguments are TRL's, but for:

    - `args`: a `TRBConfig`; a `trl.DistillationConfig` gets the defaults of what is new.
    - `teacher_model`: by default the one that `args.teacher_model_name_or_path` names.
    - `rollout_policy`: who writes; by default the trust region of `args`. `trimtab.distill.rollouts` has others.
    - `teacher_processing_class`: the teacher's tokenizer or processor. With it, or a teacher given by name, each token
      id must stand for the same token in both models.

    While the teacher writes along, transformers generates, also with `use_vllm=True`, and rollouts are plain sampling:
    the bound on KL(mu || p) holds for what is sampled from, so top-p, top-k, min-p, penalties and beams are refused.
    Tools may be called; images are refused. Under FSDP, version 2 is needed.

    Logged, as means over tokens of all processes: `rollout/epsilon`, `rollout/blend_weight` (the trust region's beta),
    `rollout/share_student` (tokens with beta 0) and `rollout/share_teacher` (beta 1), `rollout/kl_to_student`,
    `rollout/teacher_log_prob`, `rollout/teacher_entropy`, `rollout/student_entropy`, and `rollout/seconds`, the mean
    over processes.

    Raises `TrimtabError` for settings that do not go together, vocabularies that differ in size (unless
    `allow_padded_vocabulary`) or in tokens, and a teacher that cannot be moved with `offload_teacher`.
    """

    use_vllm: bool  # TRL's, which has no types

    _tag_names = ("trl", "distillation", "trb")
    _name = "TRB"
    _paper = {  # noqa: RUF012 - TRL's name and type
        "title": find("trb").references[0].title,
        "id": find("trb").arxiv,
        "citation": bibtex("trb"),
    }

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        *,
        rollout_policy: RolloutPolicy | None = None,
        teacher_processing_class: Any = None,
    ) -> None:
        args = own_config(args, model)
        self.rollout_policy = args.trust_region() if rollout_policy is None else rollout_policy
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None:
            raise TrimtabError("teacher_model=None: give the teacher, or its name in args.teacher_model_name_or_path.")
        padded = differ_in_size(model, teacher_model, args)
        super().__init__(
            model=model,
            teacher_model=None if padded else teacher_model,  # TRL refuses it
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        if padded:
            self.teacher_model = self._prepare_teacher(teacher_model)
        self._check_offload()
        teachers = teachers_tokenizer(teacher_model, teacher_processing_class, args)
        tokens = common_tokens(self._tokenizer, teachers)
        # Ids that no head has, as Gemma 3's tokenizer has one, cannot be written.
        head = min(each.config.get_text_config().vocab_size for each in (self.model, self._teacher))
        self.stop_ids = self._common_stop_ids(self._tokenizer if teachers is None else teachers)
        self.comparison = Comparison(
            estimator=args.loss_estimator,
            k=args.loss_top_k,
            temperature=args.temperature,
            stop_ids=self.stop_ids,
            vocab_size=min(tokens, head) if padded else None,
        )
        check_comparison(self.comparison, self.beta, head)
        self._own_loss = not self.comparison.is_trls
        self._suppress()
        self._check_guidance()
        self._rollouts = RolloutMetrics()
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._teacher_hidden: Any = None
        self._said_that_vllm_waits = False

    # -- what TRL's constructor leaves open --------------------------------------------------------

    def _prepare_teacher(self, teacher: Any) -> Any:
        """As TRL prepares one, without asking for equal vocabularies."""
        if isinstance(teacher, str):
            settings = {"trust_remote_code": self.args.trust_remote_code, **(self.args.teacher_model_init_kwargs or {})}
            if self.args.teacher_model_revision is not None:
                settings.setdefault("revision", self.args.teacher_model_revision)
            settings.setdefault("dtype", None)  # the one that it was saved in
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                settings["device_map"] = None
            teacher = create_model_from_path(teacher, **settings)
        elif self.args.teacher_model_init_kwargs is not None:
            raise TrimtabError("teacher_model_init_kwargs are for a teacher given by name, and this one is a model.")
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _check_guidance(self) -> None:
        """Refused now, and not in the middle of a run: what two models cannot do together, at whichever step."""
        if not any(map(self.rollout_policy.needs_teacher, range(self._steps()))):
            return
        if self._dist.fsdp_version == 1:
            raise TrimtabError("fsdp_version=1: a teacher that writes along needs fsdp_version=2.")
        plain_sampling(self.model, self._guided_config())
        self.teacher_model.eval()
        TeacherDecoder(self._teacher, self._teachers_cache)

    def _steps(self) -> int:
        """How many the run will have."""
        args = self.args
        if args.max_steps > 0:
            return int(args.max_steps)
        answers = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(args.num_train_epochs * len(self.train_dataset) / answers)

    def _guided_config(self) -> Any:
        """TRL's, without the temperature, which is the processor's part."""
        config = copy.deepcopy(self.generation_config)
        for name, ours in (("temperature", self.temperature), ("eos_token_id", self.eos_token_ids)):
            if getattr(config, name) != ours:
                raise TrimtabError(
                    f"{name}={getattr(config, name)} in generation_kwargs: where the teacher writes along it is that "
                    f"of the loss, {ours}."
                )
        config.temperature = 1.0
        return config

    @property
    def _teachers_cache(self) -> str:
        return self.args.cache_implementation or "dynamic"

    def _check_offload(self) -> None:
        if not self.args.offload_teacher:
            return
        teacher = self._teacher
        for reason, held in (
            ("DeepSpeed holds the teacher's weights", self.is_deepspeed_enabled),
            ("FSDP holds the teacher's weights", self.is_fsdp_enabled),
            ("the teacher is quantised", getattr(teacher, "hf_quantizer", None) is not None),
            ("the teacher has a device_map", getattr(teacher, "hf_device_map", None) is not None),
        ):
            if held:
                raise TrimtabError(f"offload_teacher=True: {reason}, so that it cannot be moved to the CPU and back.")

    def _common_stop_ids(self, teachers_tokenizer: Any) -> StopIds:
        """The student's, at which TRL ends completions as well, and the teacher's, its tokenizer's among them too."""
        if self.args.student_stop_ids is not None:
            self.eos_token_ids = list(self.args.student_stop_ids)
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
            if self.use_vllm:
                ends = {"stop_token_ids": self.eos_token_ids, "ignore_eos": True}
                self.vllm_generation.generation_kwargs = ends | self.vllm_generation.generation_kwargs
        teacher = self.args.teacher_stop_ids
        if teacher is None:
            own = self._teacher.generation_config.eos_token_id
            named = [*(own if isinstance(own, list) else [own]), teachers_tokenizer.eos_token_id]
            teacher = [token for token in named if token is not None]
        return StopIds(*(tuple(dict.fromkeys(ids)) for ids in (self.eos_token_ids, teacher)))

    def _suppress(self) -> None:
        """The student alone must not write what is no token of both models, or stops the teacher only."""
        head = self.model.config.get_text_config().vocab_size
        ids = suppressed_ids(self.stop_ids, head, self.comparison.vocab_size)
        # What is masked besides: then the scores that the teacher's statistics are recorded of are not the loss's.
        configs = (self.generation_config, self.model.generation_config)
        suppressed, *others = (
            next(filter(None, (getattr(config, name, None) for config in configs)), None) for name in _MASKING
        )
        given = {*(suppressed or ())} - {*ids}
        self._masks_more = bool(given) or any(others)
        if not ids:
            return
        ids = tuple(sorted({*ids, *given}))
        self.generation_config.suppress_tokens = list(ids)
        self.generation_kwargs["suppress_tokens"] = list(ids)
        if self.use_vllm:  # which knows biases only
            settings = self.vllm_generation.generation_kwargs
            bias = dict.fromkeys(ids, -100.0) | settings.get("logit_bias", {})
            self.vllm_generation.generation_kwargs = settings | {"logit_bias": bias}

    def _get_train_sampler(self, dataset: Any = None) -> InEpochs:
        return InEpochs(super()._get_train_sampler(dataset), lambda: self.state.epoch)

    # -- rollouts ----------------------------------------------------------------------------------

    @property
    def _teacher(self) -> Any:
        return self._bare(self.teacher_model)

    def _bare(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @property
    def _guided(self) -> bool:
        """Whether the teacher writes along now."""
        return self.model.training and self.rollout_policy.needs_teacher(self.state.global_step)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollouts.clear()
        self._statistics = None
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            # Here and not where rollouts are written: with tools some processes write more often.
            self._rollouts.log(self.accelerator, self._metrics["train"])
            if isinstance(self.rollout_policy, TrustRegion):
                budget = self.rollout_policy.budget(self.state.global_step)
                self._metrics["train"]["rollout/epsilon"].append(budget)
        if self._statistics is not None:
            ids, log_probs = (_of_length(x, output["completion_ids"].shape[1]) for x in self._statistics)
            # Tensors with a row for each rollout: TRL shuffles them and deals them out with the rest.
            output |= {"top_k_ids": ids, "teacher_top_k_log_probs": log_probs}
            self._statistics = None
        return output

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: dict[str, Any], has_tool_images: bool = False
    ) -> list[list[int]]:
        def write() -> list[list[int]]:
            written: list[list[int]] = super(TRBTrainer, self)._generate_single_turn(
                prompt_ids, images, multimodal_fields, has_tool_images
            )
            return written

        begin = time.perf_counter()
        if self._guided:
            seen = sorted(name for name in multimodal_fields if not name.endswith("token_type_ids"))
            if images is not None or seen:
                raise TrimtabError(
                    f"prompts with images or {seen}: the teacher reads tokens only while it writes along. Set "
                    "trust_region_epsilon=0.0, or a rollout_policy that needs no teacher."
                )
            completion_ids = self._write_with_teacher(write)
        else:
            self._place_teacher("cpu")
            factor = self.rollout_policy.temperature(self.state.global_step) if self.model.training else 1.0
            with self._sampling_temperature(factor):
                completion_ids = write()
        self._rollouts.add("rollout/seconds", time.perf_counter() - begin, 1)
        return completion_ids

    def _write_with_teacher(self, write: Callable[[], list[list[int]]]) -> list[list[int]]:
        """TRL's rollout, in which the student's `generate` is that of two models."""
        self._place_teacher(self.accelerator.device)
        if self.use_vllm and not self._said_that_vllm_waits:
            self._said_that_vllm_waits = True
            logger.warning(
                "use_vllm=True: vLLM has no place for a teacher in its sampler, so transformers writes the rollouts as "
                "long as the teacher writes along, and vLLM those after it."
            )
        self.teacher_model.eval()
        recorded = 0 if self.comparison.estimator == "full" or self.tools or self._masks_more else self.comparison.k
        processor = TeacherGuided(
            self._teacher,
            self.rollout_policy,
            step=self.state.global_step,
            temperature=self.temperature,
            stop_ids=self.stop_ids,
            vocab_size=self.comparison.vocab_size,
            cache_implementation=self._teachers_cache,
            record_top_k=recorded,
        )
        student = self._bare(self.model_wrapped)
        before = {name: value for name, value in vars(student).items() if name == "generate"}

        def restore() -> None:
            del student.generate
            vars(student).update(before)

        def generate(*, generation_config: Any, **inputs: Tensor) -> Any:
            restore()
            try:
                return generate_guided(student, inputs, processor, self._guided_config())
            finally:
                student.generate = generate

        use_vllm, self.use_vllm = self.use_vllm, False
        student.generate = generate
        try:
            completion_ids = write()
        finally:
            self.use_vllm = use_vllm
            restore()
        self._rollouts.add_records(processor.records())
        if recorded:
            self._statistics = processor.statistics()
        return completion_ids

    @contextmanager
    def _sampling_temperature(self, factor: float) -> Iterator[None]:
        """Rollouts, not the loss, at `factor` times the temperature."""
        samplers = [self.generation_config, *([self.vllm_generation] if self.use_vllm else [])]
        before = [sampler.temperature for sampler in samplers]
        for sampler, temperature in zip(samplers, before, strict=True):
            sampler.temperature = temperature * factor
        try:
            yield
        finally:
            for sampler, temperature in zip(samplers, before, strict=True):
                sampler.temperature = temperature

    def _place_teacher(self, device: torch.device | str) -> None:
        if self.args.offload_teacher:
            self.teacher_model.to(device)

    # -- loss --------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._views_always:
            self._add_teacher_view(inputs)
            if self.accelerator.sync_gradients:  # the step's last micro-batch
                self._rollouts.log(self.accelerator, self._metrics["train"])
        return loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if "top_k_ids" not in inputs:
            self._place_teacher(self.accelerator.device)
        compute = self._compute_own_loss if self._own_loss else super()._compute_loss
        loss, entropy, tokens = compute(unwrapped_student, inputs, num_items_in_batch)
        if self._views_always:
            self._rollouts.add("rollout/student_entropy", entropy, tokens)
        return loss, entropy, tokens

    def _compute_own_loss(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        sequences = (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
        accepted = [*inspect.signature(DistillationTrainer._get_last_hidden_state).parameters][5:]
        images = {name: inputs[name] for name in accepted if name in inputs}
        counted = _counted(inputs)
        hidden = self._get_last_hidden_state(student, *sequences, **images)[counted]
        if "top_k_ids" in inputs:
            ids, log_probs = (inputs[name][counted] for name in ("top_k_ids", "teacher_top_k_log_probs"))
            total, entropy = reverse_kl_of_statistics(hidden, Head.of(student), ids, log_probs, self.comparison)
        else:
            self.teacher_model.eval()
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            with torch.no_grad():
                theirs = self._forward_redirection(
                    self.teacher_model, teacher, self._get_last_hidden_state, teacher, *sequences, **images
                )[counted]
                teacher_head = Head.of(teacher)
            total, entropy = reverse_kl_of_hidden(hidden, Head.of(student), theirs, teacher_head, self.comparison)
        tokens = counted.sum()
        return (
            total / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
            entropy.sum(),
            tokens,
        )

    # -- the teacher's view of rollouts ------------------------------------------------------------

    @property
    def _views_always(self) -> bool:
        return self.args.teacher_statistics == "always" and self.model.training and not self._guided

    def _get_last_hidden_state(self, unwrapped_model: Any, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
        if self._views_always and self._bare(unwrapped_model) is self._teacher:
            self._teacher_hidden = hidden
        return hidden

    def _add_teacher_view(self, inputs: dict[str, Any]) -> None:
        """What the loss's pass of the teacher says of the tokens that the student has written."""
        hidden, self._teacher_hidden = self._teacher_hidden, None
        counted = _counted(inputs)
        tokens = inputs["completion_ids"][counted]
        log_prob, entropy = teacher_view(hidden[counted], Head.of(self._teacher), tokens, self.comparison)
        self._rollouts.add("rollout/teacher_log_prob", log_prob.sum(), len(tokens))
        self._rollouts.add("rollout/teacher_entropy", entropy.sum(), len(tokens))


# -- pieces ----------------------------------------------------------------------------------------


def _counted(inputs: dict[str, Any]) -> Tensor:
    """The positions of completions that are in the loss: up to and including the stop, and without tools' results."""
    mask: Tensor = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    return mask != 0


def _of_length(columns: Tensor, length: int) -> Tensor:
    """[rows, tokens, k] cut, or filled up with zeros, to `length` tokens."""
    missing = length - columns.shape[1]
    return torch.nn.functional.pad(columns, (0, 0, 0, max(missing, 0)))[:, :length]
