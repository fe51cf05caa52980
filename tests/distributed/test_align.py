"""Trust-region training on two processes equals one with the same global batches; shards move where they lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.distributed

TRAIN = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_align import train
torch.set_num_threads(1)
out, processes, kinds, resumed = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
for kind in kinds:
    train(f"{{out}}/{{kind}}", kind, processes, *resumed)
if processes > 1:
    assert dist.get_world_size() == processes, "one process ran alone"
    dist.barrier()
sys.stdout.write("done\\n")
sys.stdout.flush()
os._exit(0)  # gloo's threads may outlive the process group, and abort an orderly exit
"""

STEPS, PROMPTS, ANSWERS = 4, 3, 4
ONLINE = ("grpo", "rloo")
ADAPTERS = ("factors", "exact")
KINDS = ("dpo", *ADAPTERS, "kto", *ONLINE)

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


def train(out: str, kind: str, processes: int, resumed_from: str | None = None) -> None:
    """Writes what each process ends with: the policy, the reference at first and at last, logs, answers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig

    from trimtab.align import TRDPOTrainer, TRGRPOTrainer, TRKTOTrainer, TRRLOOTrainer, TrustRegionReference
    from trimtab.align.weights import whole
    from trimtab.gallery.testbeds.micro import micro_model

    folder = micro_model("micro-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # Completions repeat every four rows, and prompts do not: TRL's KTO puts completions to other prompts of a process's
    # batch, so that only then batches of four and of eight have the same mismatched pairs.
    words = [" bright and fine.", " dull.", " long, and then it rained.", " good."] * 2
    rows: list[dict[str, Any]] = [
        {"prompt": f"Day {i * i}:", "chosen": words[i], "rejected": words[(i + 2) % 8]} for i in range(8)
    ]
    written: list[Any] = []
    options: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    more: dict[str, Any] = {}
    if kind in ONLINE:
        trainer, config = (TRGRPOTrainer, GRPOConfig) if kind == "grpo" else (TRRLOOTrainer, RLOOConfig)
        rows = [{"prompt": f"Day {i} was" + " very" * (i % 3)} for i in range(PROMPTS * STEPS)]
        options = {"num_generations": ANSWERS, "max_completion_length": 8}
        more = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
        model.generation_config.eos_token_id = [2, *tokenizer(". ,", add_special_tokens=False).input_ids]

        class OneByOne(trainer):
            """The draws for an answer depend on step and row alone, whichever process writes it."""

            def _generate_single_turn(self, prompt_ids: Any, *others: Any) -> Any:
                first, answers = self.accelerator.process_index * len(prompt_ids), []
                for row, prompt in enumerate(prompt_ids, start=first):
                    torch.manual_seed(100 * self.state.global_step + row)
                    given = super()._generate_single_turn([prompt], *others)
                    answers += given[0] if kind == "grpo" else given
                written.extend((self.state.global_step, *pair) for pair in zip(prompt_ids, answers, strict=True))
                return (answers, None) if kind == "grpo" else answers

        trainer = OneByOne
    elif kind == "kto":
        trainer, config = TRKTOTrainer, KTOConfig
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 4 < 2} for i, r in enumerate(rows)]
    else:
        trainer, config = TRDPOTrainer, DPOConfig
        if kind in ADAPTERS:
            more = {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])}
    if kind == "sharded":
        shard_on_cpus()
        options |= {"fsdp": "full_shard auto_wrap"}
        options["fsdp_config"] = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    made = trainer(
        model,
        args=config(
            f"{out}/run",
            max_steps=STEPS,
            per_device_train_batch_size=(PROMPTS * ANSWERS if kind in ONLINE else 8) // processes,
            learning_rate=1.0 if kind in ADAPTERS else 0.1,
            optim="sgd",
            beta=0.3,
            use_cpu=kind != "sharded",
            bf16=False,
            report_to="none",
            logging_steps=1,
            gradient_checkpointing=False,
            save_strategy="steps" if kind == "dpo" else "no",
            save_steps=2,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reference=TrustRegionReference.soft(
            0.5, lora="exact" if kind == "exact" else "factors", measure=kind not in ONLINE
        ),
        **more,
    )
    assert made.accelerator.num_processes == processes, "one process ran alone"
    rank = made.accelerator.process_index
    made.reference.save(f"{out}/first-{rank}.safetensors")
    made.train(resume_from_checkpoint=resumed_from)
    made.reference.save(f"{out}/reference-{rank}.safetensors")
    policy = {name: whole(tensor) for name, tensor in made.model.named_parameters() if tensor.requires_grad}
    save_file(policy, f"{out}/policy-{rank}.safetensors")
    assert any(isinstance(tensor, DTensor) for tensor in made.model.parameters()) is (kind == "sharded")
    Path(f"{out}/{rank}.json").write_text(json.dumps({"logs": made.state.log_history, "written": written}))


def shard_on_cpus() -> None:
    """accelerate shards on accelerators alone; of processes that it takes for theirs it shards the CPU's as well."""
    from accelerate.state import DistributedType, PartialState

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one process and what two make of all kinds."""
    folders = {processes: tmp_path_factory.mktemp(str(processes)) for processes in (1, 2)}
    for processes, out in folders.items():
        launch(out, processes, KINDS)
    return folders


def launch(out: Path, processes: int, kinds: Sequence[str], *resumed_from: str) -> None:
    for kind in kinds:
        (out / kind).mkdir()
    program = TRAIN.format(tests=str(Path(__file__).parent))
    said = run(program, out, processes, str(out), str(processes), ",".join(kinds), *resumed_from)
    assert said.count("done") == processes


def results(folder: Path, rank: int) -> dict[str, Any]:
    """What a process wrote: tensors by name, and each step's logs."""
    found = json.loads((folder / f"{rank}.json").read_text())
    found["logs"] = [log for log in found["logs"] if "loss" in log]
    return found | {
        which: load_file(folder / f"{which}-{rank}.safetensors") for which in ("first", "reference", "policy")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(trained: dict[int, Path], kind: str) -> None:
    """Of the online trainers, with their default losses: TRL's "bnpo" is a mean over each process's own tokens."""
    one, *two = (results(trained[n] / kind, rank) for n, rank in ((1, 0), (2, 0), (2, 1)))
    for which in ("first", "reference", "policy"):
        for name, tensor in one[which].items():
            assert torch.equal(two[0][which][name], two[1][which][name]), f"{which} {name}"
            torch.testing.assert_close(two[0][which][name], tensor, atol=1e-6, rtol=1e-5, msg=f"{which} {name}")
    moved = [float((tensor - one["first"][name]).abs().max()) for name, tensor in one["reference"].items()]
    assert min(moved) > 0
    assert max(moved) > 3e-3

    compared = ["loss", "grad_norm", "reference/updates"]
    if kind in ONLINE:
        compared += ["kl", "reward", "entropy"]
        assert sorted(two[0]["written"] + two[1]["written"]) == sorted(one["written"]), "nothing else is compared"
        for step in range(STEPS):
            prompts, tokens = [], []
            for each in two:
                prompts.append({tuple(x) for at, x, _ in each["written"] if at == step})
                tokens.append(sum(len(y) for at, _, y in each["written"] if at == step))
            assert prompts[0] & prompts[1], "some prompt's answers are to be in both processes"
            assert tokens[0] != tokens[1], "processes with equal shares would not tell how tokens count"
        assert all(log["kl"] > 1e-4 for log in one["logs"][1:])
    else:
        measured = ("log_ratio", "distance", "kl_current", "kl_initial")
        compared += ["rewards/margins", *(f"reference/{name}" for name in measured)]
        assert abs(one["logs"][-1]["loss"] - one["logs"][0]["loss"]) > 1e-3
    for ours, theirs in zip(two[0]["logs"], one["logs"], strict=True):
        for name in compared:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert [log["reference/updates"] for log in one["logs"]] == list(range(1, STEPS + 1))


def test_shards_of_two_processes_are_one_whole(trained: dict[int, Path], tmp_path: Path) -> None:
    """FSDP2 through `Trainer`."""
    launch(tmp_path, 2, ["sharded"])
    one, *two = results(trained[1] / "dpo", 0), *(results(tmp_path / "sharded", rank) for rank in (0, 1))
    for each in two:
        for which in ("first", "reference", "policy"):
            for name, tensor in one[which].items():
                torch.testing.assert_close(each[which][name], tensor, atol=1e-6, rtol=1e-5, msg=f"{which} {name}")
        for ours, theirs in zip(each["logs"], one["logs"], strict=True):
            measured = ("log_ratio", "distance", "kl_current", "kl_initial", "margin_current", "margin_initial")
            for name in ("loss", "rewards/margins", *(f"reference/{name}" for name in measured)):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_two_processes_resume_exactly(trained: dict[int, Path], tmp_path: Path) -> None:
    checkpoint = trained[2] / "dpo" / "run" / "checkpoint-2"
    launch(tmp_path, 2, ["dpo"], str(checkpoint))
    for rank in (0, 1):
        whole, resumed = results(trained[2] / "dpo", rank), results(tmp_path / "dpo", rank)
        for which in ("policy", "reference"):
            assert all(torch.equal(tensor, resumed[which][name]) for name, tensor in whole[which].items())


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
