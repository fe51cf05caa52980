"""The supervised warm-up: whose answers, to which prompts, what is trained on them, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.core.errors import TrimtabError
from trimtab.distill import sft_warmup as module
from trimtab.distill.config import TRBConfig
from trimtab.distill.rollouts import TrustRegion
from trimtab.distill.sft_warmup import sft_warmup
from trimtab.distill.trainer import TRBTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

VOCAB, NEW = 64, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed: int, vocab: int = VOCAB, stop: int = 2) -> Any:
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
        eos_token_id=stop,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def babbler(says: int) -> Any:
    """A teacher that says one word over and over, and then, after "w9", stops: with id 5, the student's being 2."""
    teacher = llama(1, VOCAB + 6, stop=5)
    for weight in teacher.parameters():
        weight.data.zero_()
    teacher.lm_head = torch.nn.Linear(16, VOCAB + 6)
    teacher.lm_head.weight.data.zero_()
    teacher.lm_head.bias.data.fill_(-50.0)
    teacher.lm_head.bias.data[says] = 50.0
    return teacher


def made(tmp_path: Path, tokenizer: Any, teacher: Any, **settings: Any) -> TRBTrainer:
    args = TRBConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=NEW,
        allow_padded_vocabulary=True,
        **settings,
    )
    prompts = Dataset.from_list([{"prompt": f"w{i} w{i + 1}" + " w3" * (i % 3)} for i in range(16)])
    return TRBTrainer(llama(0), teacher, args, prompts, processing_class=tokenizer)


def prompts_of(trainer: TRBTrainer, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Those that distillation itself takes, in its order."""
    seen: list[list[int]] = []
    write = trainer._generate_single_turn

    def spy(prompt_ids: Any, *others: Any, **options: Any) -> Any:
        seen.extend(prompt_ids)
        return write(prompt_ids, *others, **options)

    monkeypatch.setattr(trainer, "_generate_single_turn", spy)
    trainer.args.max_steps = steps
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("says", "answer", "steps"),
    [(7, [7] * NEW, 2), (5, [2], 2), (7, [7] * NEW, 6)],
    ids=["a word", "its stop", "into the second epoch"],
)
def test_answers_are_the_teachers_to_the_first_prompts(
    tmp_path: Path, tiny_tokenizer: Any, says: int, answer: list[int], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt of the first steps, so many times, and labels on answers alone, which end with the student's stop."""
    trainer = made(tmp_path, tiny_tokenizer, babbler(says))
    found = module._teacher_answers(trainer, steps, 3)
    assert isinstance(trainer.rollout_policy, TrustRegion)
    wanted = prompts_of(made(tmp_path, tiny_tokenizer, babbler(says)), steps, monkeypatch)
    assert len(wanted) == 4 * steps
    assert found == [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt in wanted for _ in range(3)
    ]


def test_the_student_learns_to_say_what_the_teacher_says(tmp_path: Path, tiny_tokenizer: Any) -> None:
    trainer = made(tmp_path, tiny_tokenizer, babbler(7))
    teacher = {name: value.clone() for name, value in trainer.teacher_model.state_dict().items()}
    settings = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 99}
    ids = torch.tensor([[1, 5, 6]])

    def probability() -> float:
        with torch.no_grad():
            return float(trainer.model(ids).logits[0, -1].softmax(-1)[7])

    before = probability()
    output = sft_warmup(trainer, updates=15, prompt_steps=3, answers_per_prompt=1, settings=settings)
    assert output.global_step == 15
    assert before < 0.2
    assert probability() > 0.8
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher_model.state_dict().items())
    assert trainer.state.global_step == 0
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[-1]["train_loss"] >= 0


def test_the_papers_settings_with_the_trainers_batch(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Spy(module.SFTTrainer):
        def __init__(self, **given: Any) -> None:
            seen.append((given["args"], given["train_dataset"]))
            super().__init__(**given)

    monkeypatch.setattr(module, "SFTTrainer", Spy)
    trainer = made(tmp_path, tiny_tokenizer, babbler(7), seed=5)
    sft_warmup(trainer, updates=2, prompt_steps=1)
    ((args, dataset),) = seen
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-5, "constant_with_warmup", 15)
    assert (args.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2, 2)
    assert (args.seed, args.bf16, args.use_cpu, args.max_length) == (5, False, True, None)
    assert len(dataset) == 4 * 4, "four answers to each of a step's prompts"


def test_refusals(tmp_path: Path, tiny_tokenizer: Any) -> None:
    trainer = made(tmp_path, tiny_tokenizer, babbler(7))
    for name in ("updates", "prompt_steps", "answers_per_prompt"):
        with pytest.raises(TrimtabError, match=f"{name}=0 must be at least 1"):
            sft_warmup(trainer, **{name: 0})
    few = made(tmp_path, tiny_tokenizer, babbler(7))
    few.train_dataset = few.train_dataset.select(range(3))
    with pytest.raises(TrimtabError, match="fewer prompts than a step takes"):
        sft_warmup(few)
    trainer.is_fsdp_enabled = True
    with pytest.raises(TrimtabError, match="DeepSpeed or FSDP"):
        sft_warmup(trainer)
    trainer.is_fsdp_enabled = False
    trainer.train()
    with pytest.raises(TrimtabError, match="The trainer is at step 2"):
        sft_warmup(trainer)
