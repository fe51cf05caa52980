"""Trust regions on a CUDA device: the solve, rollouts of two models, and updates of a reference.

    solve      64 rows over 151,936 tokens, float32, beside 25 plain bisections
    rollout    random models of Qwen3's shape, 8 and 12 blocks, 151,936 tokens, bfloat16, 16 texts, beside both alone
    update     a soft update of a random model of Qwen3-0.6B's size, float32, beside a copy of its weights
    FSDP2      `TRDPOTrainer` under FSDP2 through `Trainer`, on two devices or more, ends with the losses and the
               reference of one process without it (a check, not a time)

Run only when named; without a CUDA device it says so and fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from benchmarks.measure import Row, Target, in_turns, print_table, write_rows
from benchmarks.trb_rollout import EPSILON, QWEN_STOPS, TOKENS, qwen
from benchmarks.trust_region import BISECTIONS, ROWS, VOCABULARY, bisect, logits
from trimtab.align.functional import trust_region_lerp_
from trimtab.core.simplex import trust_region_blend
from trimtab.distill.processor import TrustRegionBlend, generate_guided

__all__ = ["main", "rollout_calls", "solve_calls", "update_calls"]

REPEATS = 5
BATCH, PROMPT = 16, 16

Call = Callable[[], object]

FSDP = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trimtab.align import TRDPOTrainer, TrustRegionReference
from trimtab.align.weights import named_tensors, whole
from trimtab.gallery.testbeds.micro import micro_model
out, sharded, batch = Path(sys.argv[1]), sys.argv[2] == "sharded", int(sys.argv[3])
folder = micro_model("micro-llama")
rows = [{"prompt": f"Day {i}:", "chosen": f" bright {i}", "rejected": f" dull {-i}"} for i in range(8)]
more = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap":
        ["LlamaDecoderLayer"]}} if sharded else {}
args = DPOConfig(str(out / "run"), max_steps=4, per_device_train_batch_size=batch, learning_rate=0.1, optim="sgd",
                 beta=0.3, bf16=False, report_to="none", logging_steps=1, gradient_checkpointing=False,
                 save_strategy="no", train_sampling_strategy="sequential", **more)
trainer = TRDPOTrainer(AutoModelForCausalLM.from_pretrained(folder), args=args,
                       train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
                       reference=TrustRegionReference.soft(0.5))
trainer.train()
assert trainer.is_fsdp_enabled is sharded
reference = {name: whole(tensor) for name, tensor in named_tensors(trainer.ref_model).items()}
if trainer.accelerator.is_main_process:
    save_file(reference, out / "reference.safetensors")
    (out / "losses.json").write_text(json.dumps([log["loss"] for log in trainer.state.log_history if "loss" in log]))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def main() -> None:
    """Measure, print the table, and write the rows."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_trust_region needs a CUDA device")
    calls = {
        "solve": (solve_calls(ROWS, VOCABULARY, "cuda"), f"{BISECTIONS} bisections", Target("ratio", "<=", 1 / 4)),
        "rollout": (rollout_calls(VOCABULARY, 512, "cuda"), "both models alone", Target("ratio", "<=", 1.1)),
        "update": (update_calls(28, 1024, VOCABULARY, "cuda"), "a copy of the weights", None),
    }
    rows = []
    for name, (pair, peer, target) in calls.items():
        times = in_turns({who: _waited_for(call) for who, call in pair.items()}, REPEATS)
        rows.append(
            Row(
                name=f"{name} beside {peer}",
                unit="ms",
                ours=1e3 * times["ours"].wall_median,
                peer=1e3 * times["peer"].wall_median,
                peer_version=f"torch {torch.__version__}",
                target=target,
                repeats=REPEATS,
                cpu_seconds=sum(sum(taken.cpu) for taken in times.values()),
                wall_seconds=sum(sum(taken.wall) for taken in times.values()),
            )
        )
    print_table(f"Trust regions on {torch.cuda.get_device_name()}", rows)
    write_rows("gpu_trust_region", rows)
    _check_fsdp(torch.cuda.device_count())


def solve_calls(rows: int, vocabulary: int, device: str) -> dict[str, Call]:
    """Ours and plain bisection on the same logits."""
    student, teacher = (tensor.to(device) for tensor in logits(rows, vocabulary))
    return {
        "ours": lambda: trust_region_blend(student, teacher, EPSILON),
        "peer": lambda: bisect(student, teacher, EPSILON, BISECTIONS),
    }


def rollout_calls(vocabulary: int, d_model: int, device: str) -> dict[str, Call]:
    """Both models in lockstep, and each alone."""
    shapes = ((8, d_model, 3 * d_model), (12, 2 * d_model, 6 * d_model))
    student, teacher = (qwen(*shape, vocabulary).to(device, torch.bfloat16) for shape in shapes)
    prompts = torch.randint(5, vocabulary // 2, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "pad_token_id": 0, "disable_compile": True}
    plain = GenerationConfig(**settings, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    stop_ids = QWEN_STOPS if vocabulary > max(QWEN_STOPS.teacher) else None
    for model in (student, teacher):
        model.generation_config.eos_token_id = None

    def ours() -> object:
        processor = TrustRegionBlend(teacher, EPSILON, stop_ids=stop_ids)
        return generate_guided(student, inputs, processor, GenerationConfig(**settings))

    def peer() -> object:
        return [model.generate(**inputs, generation_config=plain) for model in (student, teacher)]

    return {"ours": ours, "peer": peer}


def update_calls(blocks: int, d_model: int, vocabulary: int, device: str) -> dict[str, Call]:
    """A soft update, which reads two models and writes one, and a copy, which reads one and writes one."""
    policy, reference = (qwen(blocks, d_model, 3 * d_model, vocabulary).to(device).requires_grad_(False) for _ in "12")
    ours, theirs = list(reference.parameters()), list(policy.parameters())
    return {
        "ours": lambda: trust_region_lerp_(ours, theirs, 0.6),
        "peer": lambda: torch._foreach_copy_(ours, theirs),
    }


def _waited_for(call: Call) -> Call:
    def waited() -> None:
        call()
        torch.cuda.synchronize()

    return waited


def _check_fsdp(devices: int) -> None:
    """Raises if training in shards ends elsewhere than training in one piece."""
    if devices < 2:
        print("FSDP2 through Trainer: not checked, one device has no shards")
        return
    with tempfile.TemporaryDirectory() as root:
        script = Path(root, "train.py")
        script.write_text(FSDP)
        for kind, processes in (("whole", 1), ("sharded", devices)):
            out = Path(root, kind)
            out.mkdir()
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            subprocess.run([*launch, str(script), str(out), kind, str(8 // processes)], check=True)
        losses = [json.loads(Path(root, kind, "losses.json").read_text()) for kind in ("whole", "sharded")]
        references = [load_file(Path(root, kind, "reference.safetensors")) for kind in ("whole", "sharded")]
        torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-4, rtol=1e-3)
        for name, tensor in references[0].items():
            torch.testing.assert_close(references[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    print(f"FSDP2 on {devices} devices through Trainer: losses and reference are those of one process")


if __name__ == "__main__":
    main()
