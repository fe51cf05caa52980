"""Moving a reference of Gemma 3 270M, beside a DPO training step and beside TRL's own callback.

A step is TRL's `DPOTrainer.training_step` and AdamW's, float32, two threads, 4 pairs of 32 + 32 tokens: small as such
steps go, so that the shares are upper bounds. LoRA has rank 16 on all linear layers. "bytes" is what an update writes.
"""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, SyncRefModelCallback

from benchmarks.measure import Row, Target, in_turns, print_table, write_rows
from trimtab.align import TRDPOTrainer, TrustRegionReference
from trimtab.gallery.testbeds.real_models import gemma3_270m

__all__ = ["main", "measure", "train_step"]

PAIRS, TOKENS, REPEATS = 4, 32, 5


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    folder = str(gemma3_270m())
    rows = measure(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), REPEATS)
    print_table("Reference updates, Gemma 3 270M", rows)
    write_rows("reference_update", rows)


def measure(model: Any, tokenizer: Any, repeats: int) -> list[Row]:
    """Shares of a step that updates take: of the whole model, beside TRL's, and of LoRA's adapter."""
    whole = _trainer(model, tokenizer, TrustRegionReference.soft(0.6))
    theirs = SyncRefModelCallback(whole.ref_model, None)
    lora = LoraConfig(r=16, target_modules="all-linear")
    adapter = _trainer(copy.deepcopy(model), tokenizer, TrustRegionReference.hard(1), peft_config=lora)
    times = in_turns(
        {
            "step": train_step(whole),
            "ours": lambda: whole.reference.update(1, 1),
            "TRL's": lambda: theirs._sync_target_model(whole.model, whole.ref_model, 0.6),
            "LoRA step": train_step(adapter),
            "LoRA": lambda: adapter.reference.update(1, 1),
        },
        repeats,
    )
    seconds = {name: taken.wall_median for name, taken in times.items()}
    n_bytes = {name: _bytes(trainer.reference) for name, trainer in (("whole", whole), ("LoRA", adapter))}

    def row(name: str, unit: str, ours: float, peer: float, version: str, target: Target | None) -> Row:
        return Row(
            name=name,
            unit=unit,
            ours=ours,
            peer=peer,
            peer_version=version,
            target=target,
            repeats=repeats,
            cpu_seconds=sum(sum(taken.cpu) for taken in times.values()),
            wall_seconds=sum(sum(taken.wall) for taken in times.values()),
        )

    step = f"a step of {PAIRS} pairs of {2 * TOKENS} tokens"
    trl = f"trl {importlib.metadata.version('trl')}"
    return [
        row("soft update of the whole model", "s", seconds["ours"], seconds["step"], step, Target("ratio", "<=", 0.03)),
        row("soft update, beside TRL's callback", "s", seconds["ours"], seconds["TRL's"], trl, None),
        row(
            "hard update of LoRA, r = 16", "s", seconds["LoRA"], seconds["LoRA step"], step, Target("ratio", "<=", 0.03)
        ),
        row(
            "hard update of LoRA: MB written",
            "MB",
            n_bytes["LoRA"] / 1e6,
            n_bytes["whole"] / 1e6,
            "the whole model",
            None,
        ),
    ]


def train_step(trainer: Any) -> Callable[[], None]:
    """A whole optimiser step on one and the same batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which the loop sets

    def step() -> None:
        trainer.model.train()
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def _bytes(reference: TrustRegionReference) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in reference._held().values())


def _trainer(model: Any, tokenizer: Any, reference: TrustRegionReference, **options: Any) -> Any:
    words = [tokenizer.decode(list(range(1000 + TOKENS * i, 1000 + TOKENS * (i + 1)))) for i in range(3 * PAIRS)]
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(*[iter(words)] * 3, strict=True)]
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            out,
            per_device_train_batch_size=PAIRS,
            max_length=2 * TOKENS,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        )
        if "peft_config" not in options:
            options["ref_model"] = copy.deepcopy(model)
        return TRDPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            reference=reference,
            **options,
        )


if __name__ == "__main__":
    main()
