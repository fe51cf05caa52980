"""The trainer: TRL's own where nothing is to do, the method's section by section, resuming, logs, refusals."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed
from trl import DistillationConfig, DistillationTrainer, TrlParser
from trl.trainer import distillation_trainer as host

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import entropy
from trimtab.distill import decoder
from trimtab.distill import trainer as trainer_module
from trimtab.distill.config import TRBConfig
from trimtab.distill.eos import StopIds, canonicalise
from trimtab.distill.functional import Estimator, reverse_kl
from trimtab.distill.processor import RECORDS, TeacherGuided, generate_guided
from trimtab.distill.rollouts import SKD, RolloutPolicy, TeacherOnly, TemperatureWarmup, TrustRegion, Vanilla
from trimtab.distill.trainer import TRBTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.* is deprecated:FutureWarning")

VOCAB = 64
NEW = 6
SEED = 4  # with which some rollouts stop early and others do not
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models of this size are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed: int, vocab: int = VOCAB, stops: int | list[int] | None = 2, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=stops,
        pad_token_id=0,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def prompts(n: int = 16) -> Dataset:
    """Of different lengths."""
    return Dataset.from_list([{"prompt": f"w{i} w{i + 1}" + " w3" * (i % 3)} for i in range(n)])


@dataclass
class Bed:
    """Makes trainers in a directory, with one tokenizer."""

    directory: Path
    tokenizer: Any

    def config(self, kind: Any = TRBConfig, **settings: Any) -> Any:
        defaults = {
            "output_dir": str(self.directory / "run"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "max_completion_length": NEW,
            "learning_rate": 1e-2,
            "logging_steps": 1,
        }
        return kind(**{**defaults, **settings})

    def trainer(
        self,
        *,
        kind: Any = TRBTrainer,
        student: Any = None,
        teacher: Any = None,
        args: Any = None,
        rollout_policy: Any = None,
        teacher_processing_class: Any = None,
        data: Any = None,
        peft_config: Any = None,
        processing_class: Any = None,
        **settings: Any,
    ) -> Any:
        ours = {"rollout_policy": rollout_policy, "teacher_processing_class": teacher_processing_class}
        kind_of_config = TRBConfig if issubclass(kind, TRBTrainer) else DistillationConfig
        return recording(kind)(
            llama(0) if student is None else student,
            llama(1) if teacher is None else teacher,
            self.config(kind_of_config, **settings) if args is None else args,
            prompts() if data is None else data,
            processing_class=processing_class or self.tokenizer,
            peft_config=peft_config,
            **(ours if issubclass(kind, TRBTrainer) else {}),
        )


@pytest.fixture
def bed(tmp_path: Path, tiny_tokenizer: Any) -> Bed:
    return Bed(tmp_path, tiny_tokenizer)


def recording(kind: Any) -> Any:
    """The trainer, with all that it writes in `written`."""

    class Recording(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.written: list[Any] = []
            super().__init__(*args, **kwargs)

        def _generate_single_turn(self, prompt_ids: Any, *others: Any, **options: Any) -> Any:
            answers = super()._generate_single_turn(prompt_ids, *others, **options)
            self.written.append((prompt_ids, answers))
            return answers

    return Recording


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def count_calls(model: Any) -> list[int]:
    """The lengths of the texts that a model is given from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True)
    return calls


# -- where nothing is to do, TRL's own, bit for bit -------------------------------------------------


@pytest.mark.parametrize(
    "nothing",
    [
        {"trust_region_epsilon": 0.0},
        {"trust_region_warmup_steps": 0},
        {"rollout_policy": Vanilla()},
        {"rollout_policy": TemperatureWarmup(0.5, steps=0)},
        {"stops": [2, 9], "trust_region_epsilon": 0.0, "beta": 0.5},
    ],
    ids=str,
)
def test_without_a_budget_all_is_trls(bed: Bed, nothing: dict[str, Any]) -> None:
    nothing = dict(nothing)
    stops, beta = nothing.pop("stops", 2), nothing.get("beta", 1.0)

    def models() -> dict[str, Any]:
        return {"student": llama(0, stops=stops), "teacher": llama(1, stops=stops)}

    theirs = bed.trainer(kind=DistillationTrainer, gradient_accumulation_steps=2, max_steps=5, beta=beta, **models())
    theirs.train()
    ours = bed.trainer(gradient_accumulation_steps=2, max_steps=5, **models(), **nothing)
    ours.train()
    assert len(ours.written) == 5, "three epochs"
    assert ours.written == theirs.written
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert_same(weights(ours), weights(theirs))


def test_a_config_of_trls_gets_our_defaults(bed: Bed) -> None:
    args = bed.config(DistillationConfig, temperature=0.7, max_steps=1, gradient_accumulation_steps=2)
    trainer = bed.trainer(args=args)
    assert (trainer.args.temperature, trainer.args.gradient_accumulation_steps) == (0.7, 2)
    assert trainer.args.bf16 is False
    assert trainer.rollout_policy == TrustRegion(0.02, 50)
    trainer.train()
    assert logged(trainer, "rollout/epsilon") == [0.02]


def test_the_command_line_of_trls_scripts_knows_the_settings(tmp_path: Path) -> None:
    given = ["--trust_region_epsilon", "0.1", "--student_stop_ids", "1", "2", "--loss_estimator", "topk_pg"]
    host_settings = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (config,) = TrlParser(TRBConfig).parse_args_and_config([*host_settings, *given])
    assert config.trust_region() == TrustRegion(0.1, 50)
    assert (config.student_stop_ids, config.loss_estimator) == ([1, 2], "topk_pg")


def test_after_the_warm_up_no_teacher_writes_and_no_cache_is_left(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[Any]] = []
    steps: list[int] = []
    begin = decoder.TeacherDecoder._begin

    def spy(self: Any, *args: Any) -> None:
        begin(self, *args)
        caches.append(weakref.ref(self.cache))
        steps.append(trainer.state.global_step)

    monkeypatch.setattr(decoder.TeacherDecoder, "_begin", spy)
    trainer = bed.trainer(trust_region_epsilon=0.5, trust_region_warmup_steps=2, max_steps=4)
    calls = count_calls(trainer.teacher_model.model)
    alive: list[int] = []
    write = trainer._generate_and_score_completions

    def watch(inputs: Any) -> Any:
        gc.collect()
        alive.append(sum(cache() is not None for cache in caches))
        before = len(calls)
        output = write(inputs)
        assert (len(calls) > before) == (trainer.state.global_step < 2)
        return output

    trainer._generate_and_score_completions = watch
    trainer.train()
    assert steps == [0, 1]
    assert alive == [0, 0, 0, 0]
    assert logged(trainer, "rollout/epsilon") == [0.5, 0.25, 0.0, 0.0]
    assert "generate" not in vars(trainer.model)
    assert all(weight.grad is None for weight in trainer.teacher_model.parameters())


def test_evaluation_is_the_student_alone(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bed.trainer(trust_region_epsilon=0.5, per_device_eval_batch_size=4)
    theirs = bed.trainer(kind=DistillationTrainer, per_device_eval_batch_size=4)
    monkeypatch.setattr(trainer_module, "TeacherGuided", None)
    found = []
    for each in (trainer, theirs):
        set_seed(0)
        found.append(each.evaluate(prompts(4))["eval_loss"])
    assert found[0] == found[1]
    assert trainer.written == theirs.written
    assert not any("rollout" in name for name in trainer.state.log_history[-1])


# -- rollouts ----------------------------------------------------------------------------------------


def guided_by_hand(bed: Bed, policy: RolloutPolicy, prompt_ids: list[list[int]], temperature: float) -> Any:
    longest = max(map(len, prompt_ids))
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompt_ids])
    student, teacher = llama(0), llama(1)
    processor = TeacherGuided(teacher, policy, temperature=temperature, stop_ids=StopIds((2,), (2,)))
    set_seed(SEED)
    output = generate_guided(
        student,
        {"input_ids": ids, "attention_mask": mask},
        processor,
        GenerationConfig(max_new_tokens=NEW, pad_token_id=0, eos_token_id=2),
    )
    answers = [row[: row.index(2) + 1] if 2 in row else row for row in output[:, longest:].tolist()]
    return answers, processor


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("policy", [TrustRegion(0.5), SKD(3), TeacherOnly(1)], ids=lambda p: type(p).__name__)
def test_rollouts_are_those_of_two_model_decoding(bed: Bed, policy: Any, cache: str | None) -> None:
    """The same tokens from the same seed, and the logs are its records' means."""
    trainer = bed.trainer(rollout_policy=policy, temperature=1.3, cache_implementation=cache)
    trainer.model.train()
    examples = list(prompts())
    set_seed(SEED)
    trainer._generate_and_score_completions(examples)
    ((prompt_ids, found),) = trainer.written
    wanted, processor = guided_by_hand(bed, policy, prompt_ids, 1.3)
    assert found == wanted
    assert len({*map(len, found)}) > 1, "some row should stop early"
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rollout/")}
    expected = processor.metrics()
    names = {"divergence": "kl_to_student"}
    for name, value in expected.items():
        assert metrics.pop(f"rollout/{names.get(name, name)}") == pytest.approx(value, rel=1e-5), name
    assert metrics.pop("rollout/seconds") > 0
    assert metrics == ({"rollout/epsilon": 0.5} if isinstance(policy, TrustRegion) else {})
    assert set(RECORDS) - set(expected) == (set() if isinstance(policy, TrustRegion) else {"blend_weight"})


def test_temperature_warm_up_is_of_rollouts_not_of_the_loss(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bed.trainer(rollout_policy=TemperatureWarmup(0.5, steps=2), temperature=2.0, max_steps=3)
    seen, of_loss = [], []
    generate, compare = trainer.model.generate, host._chunked_divergence_loss

    def spy(**inputs: Any) -> Any:
        seen.append(inputs["generation_config"].temperature)
        return generate(**inputs)

    def loss(*args: Any, **options: Any) -> Any:
        of_loss.append(options["temperature"])
        return compare(*args, **options)

    monkeypatch.setattr(trainer.model, "generate", spy)
    monkeypatch.setattr(host, "_chunked_divergence_loss", loss)
    trainer.train()
    assert seen == [1.0, 1.5, 2.0]
    assert of_loss == [2.0, 2.0, 2.0]
    assert trainer.generation_config.temperature == 2.0


class FakeVLLM:
    """What TRL makes of `use_vllm=True`, as far as is seen of it."""

    def __init__(self, *, temperature: float, generation_kwargs: dict[str, Any] | None, **others: Any) -> None:
        self.temperature = temperature
        self.generation_kwargs = generation_kwargs or {}
        self.synced = 0
        self.temperatures: list[float] = []

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: list[list[int]], **others: Any) -> Any:
        self.temperatures.append(self.temperature)
        return prompts, [[7, 2] for _ in prompts], None, None


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_vllm_available", lambda: True)
    monkeypatch.setattr(host, "VLLMGeneration", FakeVLLM)


@pytest.mark.usefixtures("_vllm")
def test_transformers_writes_in_the_warm_up_and_vllm_after_it(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    trainer = bed.trainer(use_vllm=True, trust_region_epsilon=0.5, trust_region_warmup_steps=2, max_steps=4)
    with caplog.at_level(logging.WARNING, trainer_module.__name__):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if record.name == trainer_module.__name__]
    assert "vLLM has no place for a teacher" in message
    by_vllm = [all(answer == [7, 2] for answer in answers) for _, answers in trainer.written]
    assert by_vllm == [False, False, True, True]
    assert trainer.vllm_generation.synced == 2
    assert trainer.use_vllm


@pytest.mark.usefixtures("_vllm")
def test_vllm_stops_where_the_student_does_and_settings_stay_the_users(bed: Bed) -> None:
    given = {"seed": 3, "logit_bias": {8: 1.0}}
    args = bed.config(use_vllm=True, generation_kwargs=given, student_stop_ids=[7], teacher_stop_ids=[5])
    trainer = bed.trainer(args=args, rollout_policy=Vanilla())
    assert trainer.vllm_generation.generation_kwargs == {
        "seed": 3,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logit_bias": {5: -100.0, 8: 1.0},
    }
    assert args.generation_kwargs == {"seed": 3, "logit_bias": {8: 1.0}}


@pytest.mark.usefixtures("_vllm")
def test_vllm_takes_the_temperature_and_what_must_not_be_written(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    trainer = bed.trainer(
        use_vllm=True, rollout_policy=TemperatureWarmup(0.5, steps=2), teacher=llama(1, stops=5), max_steps=3
    )
    with caplog.at_level(logging.WARNING, trainer_module.__name__):
        trainer.train()
    assert trainer.vllm_generation.temperatures == [0.5, 0.75, 1.0]
    assert trainer.vllm_generation.generation_kwargs == {"logit_bias": {5: -100.0}}
    assert not [record for record in caplog.records if record.name == trainer_module.__name__]


# -- loss --------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_by_hand(trainer: Any, inputs: dict[str, Tensor], stop_ids: StopIds, vocab_size: int | None) -> Tensor:
    """Of every token up to the stop, the KL of whole logits, [tokens]."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logits = (
        model(ids, attention_mask=mask).logits[:, -length - 1 : -1].double() / trainer.args.temperature
        for model in (trainer.model, trainer.teacher_model)
    )
    ours, theirs = canonicalise(*logits, stop_ids, vocab_size)
    per_token = reverse_kl(ours, theirs, estimator=trainer.args.loss_estimator, k=trainer.args.loss_top_k)
    counted = []
    for row, answer, keep in zip(per_token, inputs["completion_ids"].tolist(), inputs["completion_mask"], strict=True):
        stops = [i for i, token in enumerate(answer) if token in stop_ids.student]
        end = stops[0] + 1 if stops else int(keep.sum())
        assert int(keep.sum()) == end
        counted.append(row[:end])
    return torch.cat(counted)


CASES: dict[str, dict[str, Any]] = {
    "one stop, one vocabulary": {},
    "another stop": {"teacher": [5, 2], "stop_ids": StopIds((2,), (5, 2))},
    "another stop alone": {"teacher_stop_ids": [5], "stop_ids": StopIds((2,), (5,))},
    "several stops each": {"student": [2, 9], "teacher_stop_ids": [9, 5], "stop_ids": StopIds((2, 9), (9, 5))},
    "a padded student": {"size": (VOCAB + 6, VOCAB), "vocab_size": VOCAB},
    "padded and another stop": {
        "size": (VOCAB, VOCAB + 3),
        "teacher": 5,
        "stop_ids": StopIds((2,), (5, 2)),
        "vocab_size": VOCAB,
    },
}


def made(bed: Bed, case: dict[str, Any], **settings: Any) -> Any:
    sizes = case.get("size", (VOCAB, VOCAB))
    return bed.trainer(
        student=llama(0, sizes[0], case.get("student", 2)),
        teacher=llama(1, sizes[1], case.get("teacher", 2)),
        allow_padded_vocabulary="vocab_size" in case,
        teacher_stop_ids=case.get("teacher_stop_ids"),
        **settings,
    )


@pytest.mark.parametrize("policy", [TrustRegion(0.5), Vanilla()], ids=["guided", "alone"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_the_loss_of_a_batch_of_micro_batches(bed: Bed, estimator: str, case: dict[str, Any], policy: Any) -> None:
    """Token-mean over the whole batch, though it comes in parts, in whatever order."""
    trainer = made(
        bed,
        case,
        rollout_policy=policy,
        loss_estimator=estimator,
        loss_top_k=4,
        temperature=1.3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
    )
    trainer.model.train()
    stop_ids = case.get("stop_ids", StopIds((2,), (2,)))
    trainer._prepare_inputs([prompts()[i] for i in range(6)])
    found, wanted = 0.0, []
    for inputs in trainer._buffered_inputs:
        found += trainer.compute_loss(trainer.model, inputs).item()
        wanted.append(loss_by_hand(trainer, inputs, stop_ids, case.get("vocab_size")))
    tokens = torch.cat(wanted)
    assert found == pytest.approx(tokens.mean().item(), rel=2e-5, abs=1e-6)
    assert trainer._buffered_inputs[0]["num_items_in_batch"] == len(tokens)
    assert ("top_k_ids" in inputs) == (estimator != "full" and policy.needs_teacher(0))


@pytest.mark.parametrize("estimator", get_args(Estimator)[1:])
def test_recorded_statistics_survive_the_shuffle_and_spare_the_teacher(bed: Bed, estimator: str) -> None:
    trainer = bed.trainer(
        teacher=llama(1, stops=[5, 2]),
        trust_region_epsilon=0.5,
        loss_estimator=estimator,
        loss_top_k=4,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
        pad_to_multiple_of=4,
    )
    trainer.model.train()
    trainer._prepare_inputs([prompts()[i] for i in range(6)])
    order = [[i for i in row if i] for part in trainer._buffered_inputs for row in part["prompt_ids"].tolist()]
    assert order != trainer.written[0][0]
    assert sorted(order) == sorted(trainer.written[0][0])
    calls = count_calls(trainer.teacher_model.model)
    for inputs in trainer._buffered_inputs:
        assert inputs["top_k_ids"].shape == (2, inputs["completion_ids"].shape[1], 4)
        recorded = trainer.compute_loss(trainer.model, inputs)
        (gradient,) = torch.autograd.grad(recorded, trainer.model.lm_head.weight)
        assert calls == []
        without = {name: value for name, value in inputs.items() if "top_k" not in name}
        computed = trainer.compute_loss(trainer.model, without)
        (wanted,) = torch.autograd.grad(computed, trainer.model.lm_head.weight)
        assert len(calls) == 1
        calls.clear()
        torch.testing.assert_close(recorded, computed, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("masks", "recorded"),
    [
        ({}, True),
        ({"suppress_tokens": [5]}, True),  # as the teacher's stop is anyway
        ({"suppress_tokens": list(range(4, 40))}, False),
        ({"min_new_tokens": NEW}, False),
        ({"bad_words_ids": [[8]]}, False),
    ],
    ids=str,
)
def test_the_loss_is_of_whole_distributions_whatever_rollouts_mask(
    bed: Bed, masks: dict[str, Any], recorded: bool
) -> None:
    trainer = bed.trainer(
        teacher_stop_ids=[5, 2],
        trust_region_epsilon=0.5,
        loss_estimator="topk_tail",
        loss_top_k=4,
        generation_kwargs=masks,
    )
    trainer.model.train()
    trainer._prepare_inputs([prompts()[i] for i in range(4)])
    (inputs,) = trainer._buffered_inputs
    assert ("top_k_ids" in inputs) is recorded
    found = trainer.compute_loss(trainer.model, inputs).item()
    wanted = loss_by_hand(trainer, inputs, StopIds((2,), (5, 2)), None).mean().item()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_teacher_that_was_put_into_training_mode_is_taken_out_of_it(bed: Bed) -> None:
    for settings in ({}, {"loss_estimator": "topk_pg", "rollout_policy": Vanilla()}):
        losses = []
        for training in (False, True):
            teacher = llama(1, attention_dropout=0.5)
            trainer = bed.trainer(teacher=teacher.train(training), trust_region_epsilon=0.5, max_steps=1, **settings)
            trainer.teacher_model.train(training)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == losses[1]


def test_a_generate_of_the_users_is_called_and_kept(bed: Bed) -> None:
    student, lengths = llama(0), []
    generate = student.generate

    def users(**inputs: Any) -> Any:
        output = generate(**inputs)
        lengths.append(output.shape[1])
        return output

    student.generate = users
    trainer = bed.trainer(student=student, trust_region_epsilon=0.5, trust_region_warmup_steps=2)
    trainer.train()
    assert len(lengths) == 3
    assert trainer.model.generate is users
    trainer.teacher_model.lm_head.weight.data.fill_(math.nan)
    trainer.state.global_step = 0
    with pytest.raises(TrimtabError, match="NaN"):
        trainer._generate_single_turn([[1, 5]], None, {})
    assert trainer.model.generate is users


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"teacher_stop_ids": [5], "teacher_statistics": "always"}], ids=str)
def test_compiled_models(bed: Bed, settings: dict[str, Any]) -> None:
    shared = {"trust_region_epsilon": 0.5, "trust_region_warmup_steps": 2, **settings}
    plain = bed.trainer(**shared)
    plain.train()
    compiled = bed.trainer(torch_compile=True, torch_compile_backend="eager", **shared)
    compiled.train()
    assert compiled.written[0] == plain.written[0]
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)
    assert "generate" not in vars(compiled.model)
    views = 3 if "teacher_statistics" in settings else 2
    assert len(logged(compiled, "rollout/teacher_log_prob")) == views


def test_equal_models_have_no_loss_and_stay(bed: Bed) -> None:
    """But for a policy gradient's noise, none of the estimators has anything to teach."""
    for estimator in ("full", "topk_renorm", "topk_tail", "topk_pg"):
        trainer = bed.trainer(teacher=llama(0), loss_estimator=estimator, optim="sgd", max_steps=2)
        before = weights(trainer)
        trainer.train()
        assert logged(trainer, "loss") == pytest.approx([0, 0], abs=1e-5)
        for name, value in weights(trainer).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_autocast_and_checkpointing_change_little_or_nothing(
    bed: Bed, estimator: str, settings: dict[str, Any]
) -> None:
    shared = {"teacher_stop_ids": [5], "trust_region_epsilon": 0.5, "trust_region_warmup_steps": 1, "max_steps": 2}
    plain = bed.trainer(loss_estimator=estimator, **shared)
    plain.train()
    other = bed.trainer(loss_estimator=estimator, **shared, **settings)
    other.train()
    assert other.written[0] == plain.written[0]
    tolerance = 0.05 if "bf16" in settings else 1e-5
    assert logged(other, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=tolerance)
    assert logged(other, "grad_norm")[0] == pytest.approx(logged(plain, "grad_norm")[0], rel=tolerance)


def test_other_divergences_stay_with_trl(bed: Bed) -> None:
    trainer = bed.trainer(beta=0.5, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] > 0
    with pytest.raises(TrimtabError, match=r"beta=0.5: with StopIds\(student=\(2,\), teacher=\(5, 2\)\)"):
        bed.trainer(beta=0.5, teacher=llama(1, stops=5))


# -- vocabularies and stops --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [TrustRegion(0.5), SKD(3), Vanilla()], ids=lambda p: type(p).__name__)
def test_only_the_students_stop_is_written(bed: Bed, policy: Any) -> None:
    student, teacher = llama(0, VOCAB + 6, [2]), llama(1, VOCAB, [5])
    for model, likely in ((student, [5, *range(VOCAB, VOCAB + 6)]), (teacher, [5])):
        # Both would write the other's stop id, or what is no token, nearly always.
        head = torch.nn.Linear(16, model.config.vocab_size)
        head.weight = model.lm_head.weight
        head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(likely), 4.0))
        model.lm_head = head
    trainer = bed.trainer(
        student=student, teacher=teacher, rollout_policy=policy, allow_padded_vocabulary=True, max_steps=2
    )
    assert trainer.eos_token_ids == [2]
    trainer.train()
    answers = [answer for _, batch in trainer.written for answer in batch]
    assert all(token < VOCAB and token != 5 for answer in answers for token in answer)
    if policy.needs_teacher(0):
        assert any(answer[-1] == 2 and len(answer) < NEW for answer in answers), "the teacher's stop, written as ours"
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_stop_ids_that_are_given_count(bed: Bed) -> None:
    trainer = bed.trainer(student_stop_ids=(7, 2), teacher_stop_ids=[9], max_steps=1)
    assert trainer.comparison.stop_ids == StopIds((7, 2), (9,))
    assert trainer.generation_config.eos_token_id == [7, 2]
    assert trainer.generation_config.suppress_tokens == [9]
    trainer.train()
    assert trainer.model.generation_config.eos_token_id == 2, "the model's own is as it was"


def test_a_teacher_stops_at_its_tokenizers_end_too(bed: Bed) -> None:
    """As TRL's student does: of models of one kind, neither may lose it."""
    assert bed.trainer(teacher=llama(1, stops=None)).stop_ids == StopIds((2,), (2,))
    other = other_end(bed.tokenizer, "w5")
    assert other.eos_token_id == 9
    same = bed.trainer(teacher=llama(0), processing_class=other, max_steps=1)
    assert same.stop_ids == StopIds((9, 2), (2, 9))
    same.train()
    assert logged(same, "loss") == pytest.approx([0.0], abs=1e-6)
    theirs = bed.trainer(teacher=llama(1, stops=5), teacher_processing_class=other)
    assert theirs.stop_ids == StopIds((2,), (5, 9))


def other_end(tokenizer: Any, token: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token=token, unk_token="<unk>"
    )


def test_tokens_that_are_suppressed_already_stay_so(bed: Bed) -> None:
    trainer = bed.trainer(teacher=llama(1, stops=5), generation_kwargs={"suppress_tokens": [8]})
    assert trainer.generation_config.suppress_tokens == [5, 8]


def test_vocabularies_of_different_sizes_must_be_allowed(bed: Bed) -> None:
    with pytest.raises(TrimtabError, match=r"64 ids and the teacher for 70.*allow_padded_vocabulary=True"):
        bed.trainer(teacher=llama(1, VOCAB + 6))


def test_a_tokenizer_may_have_ids_that_no_head_has(bed: Bed) -> None:
    """As Gemma 3's has one; they cannot be written."""
    for sizes, common in (((63, 63), None), ((60, 63), 60), ((63, 60), 60)):
        trainer = bed.trainer(
            student=llama(0, sizes[0]),
            teacher=llama(1, sizes[1]),
            allow_padded_vocabulary=True,
            data=Dataset.from_list([{"prompt": f"w{i} w5"} for i in range(8)]),
            trust_region_warmup_steps=1,
            max_steps=2,
        )
        assert trainer.comparison.vocab_size == common
        trainer.train()
        assert len(trainer.written) == 2
        assert max(token for _, batch in trainer.written for answer in batch for token in answer) < min(sizes)


def other_tokenizer(tokenizer: Any) -> Any:
    """With two words exchanged."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {**tokenizer.get_vocab(), "w7": 12, "w8": 11}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_the_first_token_that_differs_is_named(bed: Bed) -> None:
    bed.trainer(teacher_processing_class=bed.tokenizer)
    with pytest.raises(TrimtabError, match="token id 11 is 'w7' for the student and 'w8' for the teacher"):
        bed.trainer(teacher_processing_class=other_tokenizer(bed.tokenizer))


@pytest.mark.parametrize("size", [VOCAB, VOCAB + 6])
def test_a_teacher_by_name_is_loaded_with_its_tokenizer(
    bed: Bed, tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    llama(1, size).save_pretrained(tmp_path / "teacher")
    settings = {"allow_padded_vocabulary": size > VOCAB, "max_steps": 1}
    llama(1, size).bfloat16().save_pretrained(tmp_path / "half")
    half = bed.trainer(teacher=str(tmp_path / "half"), **settings)
    assert half.teacher_model.dtype == torch.bfloat16, "as TRL has it"
    caplog.clear()
    named = bed.trainer(teacher=str(tmp_path / "teacher"), **settings)
    named.train()
    given = bed.trainer(teacher=llama(1, size), **settings)
    given.train()
    assert named.written == given.written
    assert_same(weights(named), weights(given))
    assert [r.name for r in caplog.records if "cannot be loaded, so it is taken to be the student's" in r.message] == [
        "trimtab.distill.compatibility"
    ]
    args = bed.config(teacher_model_name_or_path=str(tmp_path / "teacher"), **settings)
    assert TRBTrainer(llama(0), args=args, train_dataset=prompts(), processing_class=bed.tokenizer).teacher_model
    other_tokenizer(bed.tokenizer).save_pretrained(tmp_path / "teacher")
    with pytest.raises(TrimtabError, match="token id 11"):
        bed.trainer(teacher=str(tmp_path / "teacher"), **settings)


# -- hosts: prompts, adapters, tools -----------------------------------------------------------------


def chat(tokenizer: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_conversations_go_through_the_chat_template(bed: Bed) -> None:
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(8)])
    trainer = bed.trainer(data=data, processing_class=chat(bed.tokenizer), trust_region_epsilon=0.5, max_steps=2)
    trainer.train()
    w = bed.tokenizer.convert_tokens_to_ids
    unknown = bed.tokenizer.unk_token_id  # the roles
    for prompt in trainer.written[0][0]:
        assert prompt == [unknown, prompt[1], prompt[1] + 1, unknown]
        assert w("w0") <= prompt[1] < w("w8")
    assert logged(trainer, "rollout/epsilon") == [0.5, 0.49]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"loss_estimator": "topk_tail"}, {"teacher_stop_ids": [5]}], ids=str)
def test_a_student_with_adapters(bed: Bed, settings: dict[str, Any]) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = bed.trainer(peft_config=lora, trust_region_epsilon=0.5, trust_region_warmup_steps=2, **settings)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert len(trainer.written) == 3


def test_with_tools_every_turn_counts_and_nothing_is_recorded_for_the_loss(bed: Bed) -> None:
    trainer = bed.trainer(trust_region_epsilon=0.5, loss_estimator="topk_tail", loss_top_k=4)
    trainer.tools = [len]
    trainer.model.train()
    for turn in (1, 2):
        trainer._generate_single_turn([[1, 5, 6], [1, 7]], None, {})
        tokens = sum(len(answer) for _, answers in trainer.written for answer in answers)
        assert trainer._rollouts.sums["rollout/kl_to_student"][1] == tokens
        assert trainer._rollouts.sums["rollout/seconds"][1] == turn
    assert trainer._statistics is None


def test_images_are_refused_while_the_teacher_writes_along(bed: Bed) -> None:
    trainer = bed.trainer(trust_region_epsilon=0.5, trust_region_warmup_steps=1)
    trainer.model.train()
    with pytest.raises(TrimtabError, match=r"\['pixel_values'\]: the teacher reads tokens only"):
        trainer._generate_single_turn([[1, 5]], None, {"pixel_values": torch.zeros(1, 3, 4, 4)})
    kinds = {"token_type_ids": [[0, 0], [0, 0, 0]]}  # with which processors come of text alone
    set_seed(SEED)
    trainer._generate_single_turn([[1, 5], [1, 6, 7]], None, {})
    student, given = trainer.model.forward, []
    trainer.model.forward = lambda token_type_ids, **inputs: given.append(token_type_ids) or student(**inputs)
    set_seed(SEED)
    trainer._generate_single_turn([[1, 5], [1, 6, 7]], None, kinds)
    assert given[0].shape == (2, 3)
    assert trainer.written[-1][1] == trainer.written[-2][1]


# -- the teacher's place, its view, resuming ----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"trust_region_warmup_steps": 1}, ["device", "device", "cpu", "device"]),
        ({"trust_region_warmup_steps": 0}, ["cpu", "device", "cpu", "device"]),
        # In the warm-up the loss has all that it needs.
        ({"trust_region_warmup_steps": 1, "loss_estimator": "topk_pg"}, ["device", "cpu", "device"]),
    ],
    ids=str,
)
def test_the_teacher_is_away_while_the_student_writes(
    bed: Bed, settings: dict[str, Any], moves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = bed.trainer(offload_teacher=True, max_steps=2, **settings)
    found = []
    monkeypatch.setattr(
        trainer.teacher_model, "to", lambda to: found.append("cpu" if to == "cpu" else "device")
    )  # a torch.device
    trainer.train()
    assert found == moves
    alone = bed.trainer(max_steps=2, **settings)
    monkeypatch.setattr(alone.teacher_model, "to", None)
    alone.train()
    assert_same(weights(trainer), weights(alone))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hf_quantizer", "the teacher is quantised"), ("hf_device_map", "the teacher has a device_map")],
)
def test_a_teacher_that_cannot_be_moved(bed: Bed, name: str, reason: str) -> None:
    teacher = llama(1)
    setattr(teacher, name, {"": 0})
    with pytest.raises(TrimtabError, match=f"offload_teacher=True: {reason}"):
        bed.trainer(teacher=teacher, offload_teacher=True)


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_engines_that_hold_the_teacher(bed: Bed, engine: str) -> None:
    trainer = bed.trainer(offload_teacher=True)
    setattr(trainer, engine, True)
    with pytest.raises(TrimtabError, match="holds the teacher's weights"):
        trainer._check_offload()


def test_fsdp_of_the_first_version_cannot_decode(bed: Bed) -> None:
    trainer = bed.trainer()
    trainer._dist.fsdp_version = 1
    with pytest.raises(TrimtabError, match="fsdp_version=2"):
        trainer._check_guidance()
    trainer.rollout_policy = Vanilla()
    trainer._check_guidance()


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_estimator": "topk_pg"}, {"teacher_stop_ids": [5]}, {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_the_teachers_view_of_what_the_student_writes_alone(
    bed: Bed, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = bed.trainer(
        trust_region_epsilon=0.5,
        trust_region_warmup_steps=1,
        teacher_statistics="always",
        temperature=1.3,
        max_steps=2,
        **settings,
    )
    wanted: dict[str, list[Tensor]] = {"teacher_log_prob": [], "teacher_entropy": [], "student_entropy": []}
    compute = trainer.compute_loss

    def by_hand(model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        with torch.no_grad():
            pair = [
                m(ids, attention_mask=mask).logits[:, -length - 1 : -1] / 1.3 for m in (model, trainer.teacher_model)
            ]
            log_p, log_q = (x.log_softmax(-1)[counted] for x in canonicalise(*pair, trainer.comparison.stop_ids))
        tokens = inputs["completion_ids"][counted]
        if trainer.state.global_step == 1:  # after the warm-up
            wanted["teacher_log_prob"].append(log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
            wanted["teacher_entropy"].append(entropy(log_q))
            wanted["student_entropy"].append(entropy(log_p))
        return compute(model, inputs, *others, **options)

    trainer.compute_loss = by_hand
    trainer.train()
    parts = settings.get("gradient_accumulation_steps", 1)
    for name, found in wanted.items():
        values, lengths = logged(trainer, f"rollout/{name}"), {len(part) for part in found}
        assert len(values) == 2, "in the warm-up from the rollouts, then from the loss"
        assert len(found) == len(lengths) == parts, "parts of one length would not tell how tokens count"
        assert values[-1] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4), name
    quiet = bed.trainer(trust_region_warmup_steps=1, max_steps=2, **settings)
    quiet.train()
    assert len(logged(quiet, "rollout/teacher_log_prob")) == 1


@pytest.mark.parametrize(
    "settings", [{}, {"loss_estimator": "topk_tail", "loss_top_k": 4}, {"gradient_accumulation_steps": 2}], ids=str
)
@pytest.mark.parametrize("epochs", ["one epoch", "new epoch", "third epoch"])
def test_a_run_that_is_taken_up_again_is_the_same_run(
    bed: Bed, tmp_path: Path, settings: dict[str, Any], epochs: str
) -> None:
    """Stopped within the warm-up, which goes on where it was."""
    options = {
        "trust_region_epsilon": 0.5,
        "trust_region_warmup_steps": 3,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        **settings,
    }
    step = 4 * settings.get("gradient_accumulation_steps", 1)
    data = prompts({"one epoch": 4 * step, "new epoch": 2 * step, "third epoch": step}[epochs])
    whole = bed.trainer(data=data, **options)
    whole.train()
    again = bed.trainer(data=data, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.written == whole.written[2:]
    assert_same(weights(again), weights(whole))
    assert logged(again, "rollout/epsilon") == logged(whole, "rollout/epsilon")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2605.31159" in card
    assert "trb" in card


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_region_epsilon": -0.1}, "trust_region_epsilon=-0.1 must be finite and 0 or more"),
        ({"trust_region_epsilon": math.nan}, "trust_region_epsilon=nan must be"),
        ({"trust_region_epsilon": math.inf}, "trust_region_epsilon=inf must be"),
        ({"trust_region_warmup_steps": -1}, "trust_region_warmup_steps=-1 must be a whole number"),
        ({"trust_region_warmup_steps": 2.5}, "trust_region_warmup_steps=2.5 must be a whole number"),
        ({"trust_region_schedule": "cosine"}, "trust_region_schedule='cosine' is not known"),
        ({"loss_estimator": "sampled"}, "loss_estimator='sampled' is not known"),
        ({"teacher_statistics": "never"}, "teacher_statistics='never' is not known"),
        ({"loss_top_k": 0}, "loss_top_k=0 must be a whole number, 1 or more"),
        ({"loss_top_k": 4.5}, "loss_top_k=4.5 must be"),
        ({"trust_region_epsilon": "0.02"}, "trust_region_epsilon='0.02' must be"),
        ({"trust_region_warmup_steps": math.nan}, "trust_region_warmup_steps=nan must be"),
        ({"student_stop_ids": 2}, "student_stop_ids=2 must be a list of token ids"),
        ({"teacher_stop_ids": ["</s>"]}, r"teacher_stop_ids=\['</s>'\] must be a list"),
        ({"loss_estimator": "topk_pg", "beta": 0.5}, "beta=0.5 with loss_estimator='topk_pg'"),
    ],
    ids=str,
)
def test_settings_out_of_range(bed: Bed, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        bed.config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2: where the teacher writes along"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 3}}, "asks for assisted_generation"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "typical_p=0.9"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size=2"),
        ({"generation_kwargs": {"eos_token_id": 7}}, r"eos_token_id=7 in generation_kwargs: .* the loss, \[2\]"),
        ({"generation_kwargs": {"do_sample": False}}, "do_sample=False"),
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature=0.5"),
        ({"top_p": 0.9}, r"top_p=0.9: .* plain samples \(top_p=1.0\), since the divergence .* before any such"),
        ({"top_k": 5}, "top_k=5"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ],
    ids=str,
)
def test_what_would_change_rollouts_after_the_blend(bed: Bed, settings: dict[str, Any], message: str) -> None:
    for policy in (TrustRegion(0.02), OnlyAtLast(0.02)):
        with pytest.raises(TrimtabError, match=message):
            bed.trainer(rollout_policy=policy, **settings)
    bed.trainer(rollout_policy=Vanilla(), **settings)


class OnlyAtLast(TrustRegion):
    """At the third and last step."""

    def needs_teacher(self, step: int) -> bool:
        return step == 2


@dataclass
class Mine(DistillationConfig):
    extra: int = 1


def test_other_refusals(bed: Bed) -> None:
    with pytest.raises(TrimtabError, match="loss_top_k=65 must be at most 64"):
        bed.trainer(loss_estimator="topk_tail", loss_top_k=65)
    with pytest.raises(TrimtabError, match="loss_top_k=65 must be at most 64"):
        bed.trainer(
            student=llama(0, 70),
            teacher=llama(1, 80),
            loss_estimator="topk_tail",
            loss_top_k=65,
            allow_padded_vocabulary=True,
        )
    with pytest.raises(TrimtabError, match=r"args=Mine has \['extra'\], which TRBConfig has not: derive it"):
        bed.trainer(args=bed.config(Mine))
    with pytest.raises(TrimtabError, match="teacher_model=None"):
        TRBTrainer(llama(0), None, bed.config(), prompts(), processing_class=bed.tokenizer)
    with pytest.raises(TrimtabError, match="teacher_model_init_kwargs are for a teacher given by name"):
        bed.trainer(
            teacher=llama(1, VOCAB + 6), allow_padded_vocabulary=True, teacher_model_init_kwargs={"dtype": "float32"}
        )
    with pytest.raises(TrimtabError, match=r"stop ids \(2,\) and \(99,\) must lie below 64"):
        bed.trainer(teacher_stop_ids=[99])
