"""Trust-region training on two processes equals one with the same global batches; shards move where they lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

TRAIN = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, KTOConfig
from trimtab.align import TRDPOTrainer, TRKTOTrainer, TrustRegionReference
from trimtab.gallery.testbeds.micro import micro_model
torch.set_num_threads(1)
kind, out, processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
folder = micro_model("micro-llama")
# Completions repeat every four rows, and prompts do not: TRL's KTO puts completions to other prompts of a process's
# batch, so that only then batches of four and of eight have the same mismatched pairs.
words = [" bright and fine.", " dull.", " long, and then it rained.", " good."] * 2
rows = [{"prompt": f"Day {i * i}:", "chosen": words[i], "rejected": words[(i + 2) % 8]} for i in range(8)]
if kind == "kto":
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 4 < 2} for i, r in enumerate(rows)]
trainer, config = {"dpo": (TRDPOTrainer, DPOConfig), "kto": (TRKTOTrainer, KTOConfig)}[kind]
options = dict(max_steps=4, per_device_train_batch_size=8 // processes, learning_rate=0.1, optim="sgd", beta=0.3,
               use_cpu=True, bf16=False, report_to="none", logging_steps=1, gradient_checkpointing=False,
               save_strategy="steps", save_steps=2, disable_tqdm=True, train_sampling_strategy="sequential")
made = trainer(
    AutoModelForCausalLM.from_pretrained(folder), args=config(str(out / "run"), **options),
    train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder),
    reference=TrustRegionReference.soft(0.5, measure=True),
)
made.train(resume_from_checkpoint=sys.argv[4] if len(sys.argv) > 4 else None)
assert made.accelerator.num_processes == processes, "one process ran alone"
if made.accelerator.is_main_process:
    import json
    (out / "logs.json").write_text(json.dumps(made.state.log_history))
    save_file({n: t.detach().clone() for n, t in made.model.named_parameters()}, out / "policy.safetensors")
    save_file({n: t.clone() for n, t in made.ref_model.named_parameters()}, out / "reference.safetensors")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""

SHARDS = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from trimtab.align import TrustRegionReference, UpdateSchedule
from trimtab.core.errors import TrimtabError

class NothingIsSent(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        assert "c10d" not in str(function), f"{function} sends"
        return function(*args, **(kwargs or {}))

def llama(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=False)
    return LlamaForCausalLM(config).to(dtype)

def sharded(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

torch.set_num_threads(1)
dist.init_process_group("gloo")
assert dist.get_world_size() == 2, "one process ran alone"
mesh = init_device_mesh("cpu", (2,))
for alpha, dtype in ((1.0, torch.float32), (0.25, torch.float32), (0.25, torch.bfloat16)):
    policy, model = llama(0), llama(1, dtype)
    expected = {name: tensor.float().clone() for name, tensor in model.named_parameters()}
    start, whole = list(expected.values()), llama(0)
    for name, tensor in policy.named_parameters():
        expected[name] = tensor.detach().clone() if alpha == 1 else expected[name].lerp(tensor.detach(), alpha)
    reference = TrustRegionReference(UpdateSchedule(alpha=alpha, tau=1))
    reference.bind(sharded(policy, mesh), sharded(model, mesh))
    before = sum((first - now.detach()).square().sum() for first, now in zip(start, whole.parameters())) ** 0.5
    assert abs(reference.distance() - before) < 1e-3 * before
    with NothingIsSent():
        assert reference.update(1, 1)
    for name, tensor in model.named_parameters():
        assert isinstance(tensor, DTensor) and tensor.to_local().numel() < expected[name].numel(), name
        torch.testing.assert_close(tensor.full_tensor(), expected[name].to(dtype), msg=name, rtol=1e-6, atol=0)
    path = sys.argv[1] + f"/{alpha}-{dtype}.safetensors"
    reference.save(path, writes=dist.get_rank() == 0)
    dist.barrier()
    other = llama(2, dtype)
    again = TrustRegionReference(UpdateSchedule(alpha=alpha, tau=1))
    again.bind(policy, sharded(other, mesh))
    again.load(path)
    for (name, tensor), mine in zip(other.named_parameters(), model.parameters()):
        assert torch.equal(tensor.to_local(), mine.to_local()), name
    for each in (reference, again):
        each.update(1, 1)
    for (name, tensor), mine in zip(other.named_parameters(), model.parameters()):
        assert torch.equal(tensor.to_local(), mine.to_local()), name
# The dense average of a sharded LoRA policy is whole on each process.
from peft import LoraConfig, get_peft_model

def adapted():
    model = get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    reference = TrustRegionReference.soft(0.25, lora="exact")
    reference.bind(model)
    return model, reference

def perturbed(model):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if ".default." in name:
            noise = torch.randn(tensor.shape, generator=generator)
            if isinstance(tensor, DTensor):
                noise = distribute_tensor(noise, mesh, tensor.placements)
            tensor.data.add_(noise)

(one, following), (two, of_shards) = adapted(), adapted()
for layer in two.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(two, mesh=mesh)
assert any(isinstance(tensor, DTensor) for name, tensor in two.named_parameters() if ".default." in name)
perturbed(one), perturbed(two)
following.update(1, 1), of_shards.update(1, 1)
assert following.distance() > 0.1
assert abs(following.distance() - of_shards.distance()) < 1e-4
ids = torch.arange(6)[None]
one.set_adapter("ref"), two.set_adapter("ref")
with torch.no_grad():
    torch.testing.assert_close(two(input_ids=ids).logits, one(input_ids=ids).logits, rtol=1e-4, atol=1e-5)

try:
    mixed = TrustRegionReference.hard(1)
    mixed.bind(policy, llama(3))
    mixed.update(1, 1)
except TrimtabError as error:
    assert "shard both in the same way" in str(error)
else:
    raise AssertionError("a whole reference of a sharded policy was taken")
sys.stdout.write("done\\n")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run(TRAIN, out, processes, kind, str(out), str(processes))
        tensors = {name: load_file(out / f"{name}.safetensors") for name in ("policy", "reference")}
        logs = [log for log in json.loads((out / "logs.json").read_text()) if "loss" in log]
        found.append((tensors, logs))
    (one, logs_of_one), (two, logs_of_two) = found
    for which in ("policy", "reference"):
        for name, tensor in one[which].items():
            torch.testing.assert_close(two[which][name], tensor, atol=1e-5, rtol=1e-4, msg=f"{which} {name}")
    assert [log["reference/updates"] for log in logs_of_two] == [1, 2, 3, 4]
    assert abs(logs_of_one[-1]["loss"] - logs_of_one[0]["loss"]) > 1e-3  # it does train
    for ours, theirs in zip(logs_of_two, logs_of_one, strict=True):
        for name in ("loss", "rewards/margins", "reference/log_ratio", "reference/distance"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_two_processes_resume_exactly(tmp_path: Path) -> None:
    out, again = tmp_path / "whole", tmp_path / "again"
    run(TRAIN, out, 2, "dpo", str(out), "2")
    run(TRAIN, again, 2, "dpo", str(again), "2", str(out / "run" / "checkpoint-2"))
    for which in ("policy", "reference"):
        first, second = (load_file(folder / f"{which}.safetensors") for folder in (out, again))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_shards_move_where_they_lie(tmp_path: Path) -> None:
    """With FSDP2's placement, without sending anything; saved whole and read back in parts."""
    assert run(SHARDS, tmp_path, 2, str(tmp_path)).count("done") == 2


def run(program: str, folder: Path, processes: int, *arguments: str) -> str:
    folder.mkdir(exist_ok=True)
    script = folder / "program.py"
    script.write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
