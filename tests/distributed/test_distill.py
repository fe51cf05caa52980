"""Distillation on two processes equals that on one with the same prompts in a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.distill.rollouts import Behaviour, RolloutPolicy, TrustRegion, Vanilla

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
]

PROGRAM = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_distill import RESUMED, SETTINGS, heads_in_parts, run
torch.set_num_threads(1)
for name in SETTINGS:
    run(f"{{sys.argv[1]}}/{{name}}", name, processes=2)
for step in (0, *RESUMED):
    run(f"{{sys.argv[1]}}/{{step}}", "resumed", processes=2, resumed_at=step)
heads_in_parts()
assert dist.is_initialized() and dist.get_world_size() == 2, "one process ran alone"
sys.stdout.write(f"world size {{dist.get_world_size()}}\\n")
sys.stdout.flush()
dist.barrier()
os._exit(0)  # gloo's threads may outlive the process group, and abort an orderly exit
"""

GUIDED = 2
STEPS = 4


class Likeliest(RolloutPolicy):
    """The likeliest token of the trust region's mu: nothing random, so that processes can be compared."""

    region = TrustRegion(0.5, warmup_steps=GUIDED)

    def needs_teacher(self, step: int) -> bool:
        return self.region.needs_teacher(step)

    def log_behaviour(self, log_p: Tensor, log_q: Tensor, step: int) -> Behaviour:
        mu = self.region.log_behaviour(log_p, log_q, step)
        likeliest = torch.full_like(log_p, -torch.inf).scatter_(-1, mu.log_mu.argmax(-1, keepdim=True), 0.0)
        return Behaviour(likeliest, mu.blend_weight, mu.divergence)


def llama(seed: int, stop: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
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


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# An epoch has two steps, so that the first checkpoint is within the second and the other behind it.
RESUMED = (3, 4)

SETTINGS: dict[str, dict[str, Any]] = {
    "trls": {},
    "another stop": {"teacher_statistics": "always", "gradient_accumulation_steps": 2},
    "recorded": {"loss_estimator": "topk_tail", "loss_top_k": 4, "gradient_accumulation_steps": 2},
    "alone": {"loss_estimator": "topk_pg"},
    "after a supervised warm-up": {},
}


def run(out: str, name: str, *, processes: int, resumed_at: int | None = None) -> None:
    """Writes weights, logs, and what each process wrote; taken up where the run in the folder "0" was."""
    from datasets import Dataset

    from trimtab.distill import sft_warmup
    from trimtab.distill.config import TRBConfig
    from trimtab.distill.trainer import TRBTrainer

    written: list[Any] = []

    class Recording(TRBTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *others: Any, **options: Any) -> Any:
            self.generation_config.do_sample = self._guided or name == "resumed"  # else the student alone is greedy
            answers = super()._generate_single_turn(prompt_ids, *others, **options)
            step = self.state.global_step
            written.extend((step, *pair) for pair in zip(prompt_ids, answers, strict=True))
            return answers

    settings = SETTINGS.get(name, {"max_steps": 6, "save_strategy": "steps", "save_steps": 1})
    parts = settings.get("gradient_accumulation_steps", 1)
    args = TRBConfig(
        output_dir=f"{out}/run",
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        per_device_train_batch_size=8 // processes // parts,
        max_completion_length=8,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        **({"save_strategy": "no", "max_steps": STEPS} | settings),
    )
    size = 16 if name == "resumed" else 32
    data = Dataset.from_list([{"prompt": f"w{i} w{i + 1}" + " w3" * (i % 3)} for i in range(size)])
    trainer = Recording(
        llama(0, stop=2),
        llama(1, stop=5 if name == "another stop" else 2),
        args,
        data,
        processing_class=tokenizer(),
        rollout_policy={"alone": Vanilla(), "resumed": TrustRegion(0.5, 5)}.get(name, Likeliest()),
    )
    assert trainer.accelerator.num_processes == processes
    if name == "after a supervised warm-up":
        # All answers in one batch, since their order is that of the processes.
        supervised = {"learning_rate": 0.5, "warmup_steps": 0, "optim": "sgd"}
        supervised |= {"per_device_train_batch_size": 16 // processes}
        with mock.patch.object(sft_warmup, "TeacherOnly", return_value=Likeliest()):
            sft_warmup.sft_warmup(trainer, updates=1, prompt_steps=2, answers_per_prompt=1, settings=supervised)
    trainer.train(resume_from_checkpoint=f"{out}/../0/run/checkpoint-{resumed_at}" if resumed_at else None)
    rank = trainer.accelerator.process_index
    Path(out, f"{rank}.json").write_text(json.dumps({"written": written, "history": trainer.state.log_history}))
    save_file({k: v.contiguous() for k, v in trainer.model.state_dict().items()}, f"{out}/{rank}.safetensors")


def heads_in_parts() -> None:
    """As FSDP has them, where each process holds some rows of a head: the same loss, and gradients to the parts."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    from trimtab.distill.loss import Comparison, Head, reverse_kl_of_hidden

    student, teacher = llama(0, stop=2), llama(1, stop=2)
    hidden, other = (torch.randn(5, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    whole, _ = reverse_kl_of_hidden(hidden, Head.of(student), other, Head.of(teacher), Comparison())
    whole.backward()
    wanted = student.lm_head.weight.grad
    mesh = init_device_mesh("cpu", (2,))
    for model in (student, teacher):
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        assert model.lm_head.weight.to_local().shape == (32, 16)
    parts, _ = reverse_kl_of_hidden(hidden, Head.of(student), other, Head.of(teacher), Comparison())
    parts.backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(student.lm_head.weight.grad.full_tensor(), wanted)
    assert teacher.lm_head.weight.grad is None


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of all settings."""
    out = tmp_path_factory.mktemp("two")
    for name in (*SETTINGS, "0", *map(str, RESUMED)):
        (out / name).mkdir()
    script = out / "program.py"
    script.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("world size 2") == 2
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_equal_one(tmp_path: Path, two: Path, name: str) -> None:
    run(str(tmp_path), name, processes=1)
    alone = json.loads((tmp_path / "0.json").read_text())
    ranks = [json.loads((two / name / f"{rank}.json").read_text()) for rank in (0, 1)]
    together = sorted(rollout for rank in ranks for rollout in rank["written"])
    assert together == sorted(alone["written"]), "both must have written the same, or nothing is compared"
    assert len(together) == 8 * (STEPS + 2 * (name == "after a supervised warm-up"))
    lengths = [[sum(len(y) for at, _, y in rank["written"] if at == step) for rank in ranks] for step in range(STEPS)]
    assert any(mine != theirs for mine, theirs in lengths), (
        "processes with equal shares would not tell how tokens count"
    )

    compared = ["loss", "grad_norm", "entropy"]
    if name != "alone":
        measured = ["kl_to_student", "blend_weight", "teacher_log_prob", "teacher_entropy", "student_entropy"]
        compared += [f"rollout/{each}" for each in measured]
    for mine, theirs in zip(ranks[0]["history"][:STEPS], alone["history"][:STEPS], strict=True):
        for key in compared:
            assert (key in mine) == (key in theirs)
            # TRL averages entropies over micro-batches, whatever their tokens.
            if key in mine and not (key == "entropy" and "gradient_accumulation_steps" in SETTINGS[name]):
                assert mine[key] == pytest.approx(theirs[key], rel=2e-3), key
    views = sum("rollout/student_entropy" in entry for entry in alone["history"])
    assert views == {"alone": 0, "another stop": STEPS}.get(name, GUIDED)
    seen = [key for key in compared if any(key in entry for entry in alone["history"])]
    assert seen == compared
    wanted, start = load_file(tmp_path / "0.safetensors"), llama(0, stop=2).state_dict()
    for rank in (0, 1):
        for key, value in load_file(two / name / f"{rank}.safetensors").items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-4, msg=f"{rank} {key}")
    moved = max(float((value - start[key]).abs().max()) for key, value in wanted.items())
    assert moved > 1e-2


@pytest.mark.parametrize("step", RESUMED)
def test_two_processes_resume_exactly(two: Path, step: int) -> None:
    for rank in (0, 1):
        whole, again = (json.loads((two / name / f"{rank}.json").read_text()) for name in ("0", str(step)))
        assert len(whole["written"]) == 6 * 4
        assert again["written"] == [each for each in whole["written"] if each[0] >= step]
        wanted = load_file(two / "0" / f"{rank}.safetensors")
        for key, value in load_file(two / str(step) / f"{rank}.safetensors").items():
            assert torch.equal(value, wanted[key]), f"{rank} {key}"
