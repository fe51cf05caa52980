"""Rollouts of trust-region behaviour blending: what decoding two models in lockstep costs beside decoding each.

Three pairs of models decode 16 texts on two threads in float32: Gemma 3 270M guides its own first 6 blocks (262,144
tokens; left out without its packages), and random models of Qwen3's shape with 8 and 12 blocks, over 32,000 tokens and
over 151,936. Ours is `generate_guided`, with stop ids that differ where the tokenizer is as large as Qwen's; the
peer's time is that of `generate` on the student plus that on the teacher, as many tokens each. The peer so samples
twice per token and ours once.

The share of the solve in a two-model step is that at 64 rows and 151,936 tokens, for the shapes of Qwen3-0.6B and
Qwen3-4B. The models themselves are not run whole: a decoding step behind 16 cached tokens is timed with 1 block and
with 3, embeddings and head included, and carried on linearly to 28 and 36. Sampling is not counted. Longer texts make
the steps longer and leave the solve as it is.

After the warm-up a training step of `TRBTrainer` is set beside one of TRL's `DistillationTrainer`: 4 prompts, 12
tokens, random models over 32,000 tokens.
"""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DistillationConfig, DistillationTrainer

from benchmarks.measure import Row, Target, Times, in_turns, print_table, write_rows
from benchmarks.trust_region import logits
from trimtab.core.simplex import trust_region_blend
from trimtab.distill import TRBConfig, TRBTrainer
from trimtab.distill.eos import StopIds
from trimtab.distill.processor import TrustRegionBlend, generate_guided
from trimtab.gallery.testbeds.micro import micro_model
from trimtab.gallery.testbeds.real_models import RealModelUnavailable, gemma3_270m

__all__ = ["main", "whole_step"]

VOCABULARY = 151_936
EPSILON = 0.02
BATCH = 16
PROMPT = 16
TOKENS = 12
REPEATS = 3
ROWS = 64
BLOCKS = {"student": 28, "teacher": 36}
TIMED_BLOCKS = (1, 3)
QWEN_STOPS = StopIds((151_643,), (151_645, 151_643))
"""Of Qwen3-Base and of Qwen3."""


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    rows = [*rollout_rows(), *share_rows(), step_row()]
    print_table("Trust-region rollouts", rows)
    write_rows("trb_rollout", rows)


# -- rollouts --------------------------------------------------------------------------------------


def rollout_rows() -> list[Row]:
    """Ours beside both models' own decoding, for each pair of models."""
    rows = []
    try:
        student, teacher = gemmas()
    except RealModelUnavailable as error:
        print(f"left out: Gemma 3 270M: {error}")
    else:
        rows.append(rollout_row("Gemma 3 270M, V = 262,144", student, teacher, None))
        del student, teacher
    for vocabulary, stop_ids in ((32_000, None), (VOCABULARY, QWEN_STOPS)):
        student, teacher = qwen(8, 512, 1536, vocabulary), qwen(12, 1024, 3072, vocabulary)
        rows.append(rollout_row(f"Qwen3's shape, V = {vocabulary:,}", student, teacher, stop_ids))
    return rows


def rollout_row(name: str, student: Any, teacher: Any, stop_ids: StopIds | None) -> Row:
    """Seconds per token of the batch."""
    vocabulary = student.config.vocab_size
    prompts = torch.randint(5, vocabulary // 2, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "pad_token_id": 0, "disable_compile": True}
    plain = GenerationConfig(**settings, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    def guided() -> Tensor:
        processor = TrustRegionBlend(teacher, EPSILON, stop_ids=stop_ids)
        return generate_guided(student, inputs, processor, GenerationConfig(**settings))

    def alone(model: Any) -> Callable[[], Tensor]:
        return lambda: model.generate(**inputs, generation_config=plain)

    for model in (student, teacher):
        # Every text gets its full length; random models would hardly stop anyway.
        model.generation_config.eos_token_id = None
    times = in_turns({"ours": guided, "student": alone(student), "teacher": alone(teacher)}, REPEATS)
    return Row(
        name=f"two-model rollout, {name}",
        unit="s/token",
        ours=times["ours"].wall_median / TOKENS,
        peer=(times["student"].wall_median + times["teacher"].wall_median) / TOKENS,
        peer_version=f"both models alone, transformers {transformers.__version__}",
        target=Target("ratio", "<=", 1.1),
        repeats=REPEATS,
        **spent(times),
    )


def gemmas() -> tuple[Any, Any]:
    """The student, 6 of the teacher's 18 blocks, and the teacher."""
    path = gemma3_270m()
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for _ in range(2))
    keep_blocks(student, 6)
    return student, teacher


def qwen(blocks: int, d_model: int, d_mlp: int, vocabulary: int, heads: int = 16) -> Any:
    """A random model, of head_dim 128 and 8 key-value heads as Qwen3's are, with tied embeddings."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def keep_blocks(model: Any, blocks: int) -> None:
    """Leave the first ones."""
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    model.config.layer_types = model.config.layer_types[:blocks]


# -- after the warm-up -----------------------------------------------------------------------------


def step_row() -> Row:
    """Forward, backward and rollouts of a step in which the student writes alone, beside TRL's."""
    student, teacher = qwen(8, 512, 1536, 32_000), qwen(12, 1024, 3072, 32_000)
    trainers = {"ours": TRBTrainer, "TRL's": DistillationTrainer}
    steps = {name: training_step(trainer, copy.deepcopy(student), teacher) for name, trainer in trainers.items()}
    times = in_turns(steps, REPEATS)
    return Row(
        name="training step after the warm-up, V = 32,000",
        unit="s",
        ours=times["ours"].wall_median,
        peer=times["TRL's"].wall_median,
        peer_version=f"DistillationTrainer, trl {importlib.metadata.version('trl')}",
        repeats=REPEATS,
        **spent(times),
    )


def training_step(trainer: Any, student: Any, teacher: Any) -> Callable[[], object]:
    """Rollouts, loss and gradients of one step of `trainer`, whose trust region, if it has one, is over."""
    tokenizer = AutoTokenizer.from_pretrained(micro_model("micro-llama"))
    for model in (student, teacher):
        model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as out:
        config = TRBConfig if trainer is TRBTrainer else DistillationConfig
        over = {"trust_region_warmup_steps": 0} if trainer is TRBTrainer else {}
        args = config(
            out,
            max_completion_length=TOKENS,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            **over,
        )
        prompts = Dataset.from_list([{"prompt": "In the town by the river"}] * 4)
        made = trainer(student, teacher, args=args, train_dataset=prompts, processing_class=tokenizer)
    batch = next(iter(made.get_train_dataloader()))
    made.current_gradient_accumulation_steps = 1  # which the loop sets

    def step() -> object:
        made.model.train()
        made.model.zero_grad()
        return made.training_step(made.model, batch, None)

    return step


# -- the solve's share -----------------------------------------------------------------------------


def share_rows() -> list[Row]:
    """The solve, and all that the processor does besides the teacher's step, as shares of two models' steps."""
    student, teacher = logits(ROWS, VOCABULARY)
    fixed = FixedLogits(teacher)
    prompts = torch.ones(ROWS, 1, dtype=torch.long)
    functions: dict[str, Callable[[], object]] = {
        "solve": lambda: trust_region_blend(student, teacher, EPSILON),
        "processor": lambda: TrustRegionBlend(fixed, EPSILON, stop_ids=QWEN_STOPS)(prompts, student),
    }
    for who, shape in {"student": (1024, 3072, 16), "teacher": (2560, 9728, 32)}.items():
        d_model, d_mlp, heads = shape
        for blocks in TIMED_BLOCKS:
            functions[f"{who} {blocks}"] = decoding_step(qwen(blocks, d_model, d_mlp, VOCABULARY, heads))
    times = in_turns(functions, REPEATS)
    seconds = sum(
        whole_step(*(times[f"{who} {blocks}"].wall_median for blocks in TIMED_BLOCKS), blocks=BLOCKS[who])
        for who in BLOCKS
    )
    names = {"solve": "solve / two-model step", "processor": "solve, stop ids and records / two-model step"}
    return [
        Row(
            name=f"{name}, 0.6B and 4B, {ROWS} rows, V = 151,936",
            unit="s",
            ours=times[part].wall_median,
            peer=seconds,
            peer_version=f"steps of {TIMED_BLOCKS} blocks carried on, transformers {transformers.__version__}",
            target=Target("ratio", "<=", 0.05),
            repeats=REPEATS,
            **spent(times),
        )
        for part, name in names.items()
    ]


def whole_step(few: float, more: float, *, blocks: int) -> float:
    """Seconds of `blocks` blocks, from those of `TIMED_BLOCKS`: what is no block stays, blocks add up."""
    first, second = TIMED_BLOCKS
    per_block = (more - few) / (second - first)
    return few + (blocks - first) * per_block


def decoding_step(model: Any) -> Callable[[], Tensor]:
    """One token more for `ROWS` texts behind `PROMPT` cached tokens and those of the calls before."""
    cache = DynamicCache(config=model.config)
    token = torch.ones(ROWS, 1, dtype=torch.long)

    @torch.no_grad()
    def step() -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    with torch.no_grad():
        model(input_ids=token.expand(ROWS, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return step


class FixedLogits(nn.Module):
    """A teacher that takes no time."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values
        self.config = Qwen3Config(num_hidden_layers=1)
        self.generation_config = GenerationConfig()
        self.device = values.device
        self.eval()

    def forward(self, input_ids: Tensor, past_key_values: Any, **_: Any) -> Any:
        return SimpleNamespace(logits=self.values.unsqueeze(1), past_key_values=past_key_values)


def spent(times: dict[str, Times]) -> dict[str, float]:
    return {
        "cpu_seconds": sum(sum(taken.cpu) for taken in times.values()),
        "wall_seconds": sum(sum(taken.wall) for taken in times.values()),
    }


if __name__ == "__main__":
    main()
