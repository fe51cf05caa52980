"""`trimtab align` and `trimtab distill`, end to end on a tiny model, taken up again, and refusing bad input."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.cli import main, training
from trimtab.cli.examples import labelled_completions, preference_pairs, prompts

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = (
    "{% for message in messages %}{{ 'w1 ' if message['role'] == 'user' else 'w2 ' }}{{ message['content'] }} <eos>"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Iterator[Path]:
    """A folder with two tiny saved models of one vocabulary, and data in every form."""
    folder = tmp_path_factory.mktemp("bed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for seed, name in enumerate(("model", "teacher")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes, **ids))
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{chance.randrange(3, 60)}" for _ in range(count))

    pairs = [{"prompt": words(4), "chosen": " " + words(5), "rejected": " " + words(3)} for _ in range(12)]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "chat.jsonl", [{name: talk(name, text) for name, text in pair.items()} for pair in pairs])
    labelled = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    write(folder / "labelled.jsonl", labelled)
    write(folder / "texts.jsonl", [{"text": words(9)} for _ in range(12)])
    (folder / "template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(column: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if column == "prompt" else "assistant", "content": text.strip()}]


def align(bed: Path, out: Path, **changes: Any) -> list[str]:
    """`align` with options that take a second; an option of None is left out."""
    options = {"model": bed / "model", "data": bed / "pairs.jsonl", "out": out, "reference": "fixed", "steps": 3}
    return words("align", options | {"batch_size": 4, "learning_rate": "0.01", "seed": 1} | changes)


def distill(bed: Path, out: Path, **changes: Any) -> list[str]:
    """`distill` likewise."""
    options = {"student": bed / "model", "teacher": bed / "teacher", "data": bed / "pairs.jsonl", "out": out}
    options |= {"steps": 3, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": "0.01", "seed": 1}
    return words("distill", options | {"max_completion_length": 6} | changes)


def words(command: str, options: dict[str, Any]) -> list[str]:
    return [
        command,
        *(
            word
            for name, value in options.items()
            if value is not None
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ),
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error with which the command line refuses `arguments`."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("trimtab: ")]
    assert "Traceback" not in captured.err + captured.out
    return line


# -- align -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(bed: Path) -> Path:
    """A finished run of six steps with a reference that moves at each third."""
    assert main(align(bed, bed / "aligned", **SIX)) == 0
    return bed / "aligned"


EXACT = {"reference": "soft", "tau": None, "lora_rank": 2, "lora_soft": "exact"}
SIX = {"steps": 6, "reference": "hard", "tau": 2, "checkpoint_every": 2}


def test_align_writes_model_history_and_metrics(bed: Path, aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"checkpoints", "history.json", "metrics.json", "model", "run.json"}
    assert {path.name for path in aligned.iterdir()} == names
    assert not list((aligned / "model").glob("*.bin"))
    assert weights(aligned).keys() == load_file(bed / "model" / "model.safetensors").keys()
    metrics = json.loads((aligned / "metrics.json").read_text())
    assert (metrics["steps"], metrics["examples"], metrics["last"]["reference/updates"]) == (6, 12, 3)
    assert metrics["last"]["step"] == 6
    assert json.loads((aligned / "history.json").read_text())[-1] == metrics["last"]
    before = (aligned / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(align(bed, aligned, **SIX)) == 0  # it is finished already
    assert (aligned / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert re.search(r"updates of the reference\s*│ 3 ", capsys.readouterr().out)


def test_the_reference_matters_and_fixed_is_the_hosts_own(bed: Path, aligned: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    assert main(align(bed, tmp_path / "fixed", steps=6)) == 0
    assert not equal(tmp_path / "fixed", aligned)
    with pytest.warns(UserWarning, match="never moves"):
        assert main(align(bed, tmp_path / "late", **(SIX | {"tau": 7}))) == 0
    assert equal(tmp_path / "late", tmp_path / "fixed")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    config = DPOConfig(
        str(tmp_path / "host"),
        max_steps=6,
        beta=0.05,
        max_length=64,
        learning_rate=0.01,
        warmup_steps=0.1,
        per_device_train_batch_size=4,
        max_grad_norm=2.0,
        seed=1,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        **options,
    )
    with training.hosts_to_themselves():
        host = DPOTrainer(
            str(bed / "model"),
            args=config,
            train_dataset=datasets.load_dataset("json", data_files=str(bed / "pairs.jsonl"), split="train"),
        )
        host.train()
    host.save_model(str(tmp_path / "host" / "model"))
    assert equal(tmp_path / "host", tmp_path / "fixed")


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize(
    "reference",
    [
        {"reference": "fixed"},
        {"reference": "hard", "tau": 2},
        {"reference": "soft", "alpha": 0.5, "measure": True},
        {"reference": "every", "every": 0.34, "lora_rank": 2},
    ],
    ids=["fixed", "hard", "soft", "every-lora"],
)
def test_every_loss_goes_with_every_reference(bed: Path, tmp_path: Path, loss: str, reference: dict[str, Any]) -> None:
    assert main(align(bed, tmp_path / "run", loss=loss, **reference)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["examples"] == (24 if loss == "kto" else 12)
    if "lora_rank" in reference:
        assert {name.rsplit(".", 2)[1] for name in weights(tmp_path / "run")} == {"lora_A", "lora_B"}
    else:
        start = load_file(bed / "model" / "model.safetensors")
        assert any(not torch.equal(w, start[name]) for name, w in weights(tmp_path / "run").items())


@pytest.mark.parametrize("reference", [{"reference": "fixed"}, {"reference": "hard", "tau": 2}], ids=["fixed", "hard"])
def test_both_forms_of_ipo(bed: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    for form in ("means", "sums"):
        assert main(align(bed, tmp_path / form, loss="ipo", ipo_form=form, beta="0.5", **reference)) == 0
    assert main(align(bed, tmp_path / "default", loss="ipo", beta="0.5", **reference)) == 0
    assert equal(tmp_path / "default", tmp_path / "means")
    assert not equal(tmp_path / "sums", tmp_path / "means")


@pytest.mark.parametrize("lora_soft", ["factors", "exact"])
def test_soft_updates_of_adapters(bed: Path, tmp_path: Path, lora_soft: str) -> None:
    options = {"reference": "soft", "lora_rank": 2, "lora_soft": lora_soft}
    approximate = pytest.warns(UserWarning, match="only approximates")
    with approximate if lora_soft == "factors" else contextlib.nullcontext():
        assert main(align(bed, tmp_path / "run", **options)) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir() if path.is_dir()) == []


def test_labelled_completions_for_kto(bed: Path, tmp_path: Path) -> None:
    assert main(align(bed, tmp_path / "run", loss="kto", data=bed / "labelled.jsonl")) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["examples"] == 12


def test_conversations_in_a_chat_template(bed: Path, tmp_path: Path) -> None:
    options = {"data": bed / "chat.jsonl", "chat_template": bed / "template.jinja"}
    assert main(align(bed, tmp_path / "run", **options)) == 0
    assert "message['role']" in (tmp_path / "run" / "model" / "chat_template.jinja").read_text()
    assert main(align(bed, tmp_path / "kto", loss="kto", **options)) == 0


# -- distill ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rollouts",
    [
        {},
        {"rollouts": "trust_region", "epsilon": 0.1, "warmup_steps": 2, "loss_estimator": "topk_pg", "loss_top_k": 4},
        {"rollouts": "vanilla", "data": "{bed}/texts.jsonl", "prompt_tokens": 4},
        {"rollouts": "fixed", "epsilon": 0.1, "lora_rank": 2},
        {"rollouts": "skd", "skd_top_k": 3},
        {"rollouts": "temperature", "initial_temperature": 0.5, "warmup_steps": 2, "completions_per_prompt": 2},
        {"rollouts": "mixture", "data": "{bed}/chat.jsonl", "chat_template": "{bed}/template.jinja"},
        {"rollouts": "sft_warmup", "warmup_steps": 2},
    ],
    ids=lambda options: str(options.get("rollouts", "default")),
)
def test_every_rollout_policy_trains_a_student(bed: Path, tmp_path: Path, rollouts: dict[str, Any]) -> None:
    filled = {name: str(value).format(bed=bed) for name, value in rollouts.items()}
    assert main(distill(bed, tmp_path / "run", **filled)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 3
    assert metrics["last"]["loss"] > 0
    start = load_file(bed / "model" / "model.safetensors")
    assert any(not torch.equal(w, start.get(name, w + 1)) for name, w in weights(tmp_path / "run").items())


# -- taken up again --------------------------------------------------------------------------------


def killed_after(step: int, monkeypatch: pytest.MonkeyPatch, kill: Callable[[], object]) -> pytest.MonkeyPatch:
    """The run is killed at the end of `step`."""
    end = training._Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == step:
            kill()
        end(self, args, state, control, **others)

    monkeypatch.setattr(training._Watch, "on_step_end", on_step_end)
    return monkeypatch


def interrupt() -> None:
    raise KeyboardInterrupt


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in out.glob("checkpoints/*/complete.json"))


@pytest.mark.parametrize("reference", [SIX, SIX | EXACT], ids=["hard", "soft-lora"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]
) -> None:
    assert main(align(bed, tmp_path / "whole", **reference)) == 0
    with monkeypatch.context() as patch:
        killed_after(5, patch, interrupt)
        assert main(align(bed, tmp_path / "killed", **reference)) == 130
    assert checkpoints(tmp_path / "killed") == [2, 4]
    (tmp_path / "killed" / "checkpoints" / "checkpoint-5").mkdir()  # one whose writer was killed
    assert main(align(bed, tmp_path / "killed", **reference)) == 0
    assert equal(tmp_path / "killed", tmp_path / "whole")
    for name in ("metrics.json", "history.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_killed_distillation_goes_on_as_if_it_had_not_been(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 5, "checkpoint_every": 2, "epsilon": 0.1, "warmup_steps": 4}
    assert main(distill(bed, tmp_path / "whole", **options)) == 0
    with monkeypatch.context() as patch:
        killed_after(3, patch, interrupt)
        assert main(distill(bed, tmp_path / "killed", **options)) == 130
    assert main(distill(bed, tmp_path / "killed", **options)) == 0
    assert equal(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_writes_a_checkpoint(
    bed: Path,
    aligned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    with monkeypatch.context() as patch:
        killed_after(3, patch, lambda: os.kill(os.getpid(), number))
        assert main(align(bed, tmp_path / "run", **SIX)) == 130
    assert capsys.readouterr().err.endswith("again to stop at once\ntrimtab: interrupted\n")
    assert checkpoints(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "model").exists()
    assert main(align(bed, tmp_path / "run", **SIX)) == 0
    assert equal(tmp_path / "run", aligned)


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from trimtab.cli import main, training
end, rank = training._Watch.on_step_end, os.environ["RANK"]

def on_step_end(self, args, state, control, **others):
    if state.global_step == 3 and rank == "1":
        os.kill(os.getpid(), signal.SIGINT)
    end(self, args, state, control, **others)

training._Watch.on_step_end = on_step_end
status = main(sys.argv[2:])
Path(sys.argv[1], rank).write_text(str(status))
sys.exit(status)
"""


@pytest.mark.distributed
def test_processes_stop_after_the_same_step_and_each_with_130(bed: Path, tmp_path: Path) -> None:
    """One of two is asked to. torchrun itself then ends with 1, whatever its processes end with."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = align(bed, tmp_path / "run", batch_size=2, **SIX)
    launcher = subprocess.Popen(
        [*launch, "--shutdown-timeout", "5", str(tmp_path / "program.py"), str(tmp_path), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert launcher.wait(150) == 1
    finally:
        launcher.terminate()  # and it its processes, should they wait for each other
        launcher.wait()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["130", "130"]
    assert checkpoints(tmp_path / "run") == [2, 3]


def test_a_run_that_was_killed_before_its_model_was_saved(bed: Path, aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.json").unlink()
    assert main(align(bed, tmp_path / "run", **SIX)) == 0
    assert equal(tmp_path / "run", aligned)


def test_other_options_do_not_go_into_the_same_directory(
    bed: Path, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(align(bed, aligned, **(SIX | {"beta": 0.5})), capsys)
    assert "belongs to another run: beta is 0.05 there, expected 0.5" in line
    other = write(tmp_path / "other.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 12)
    shutil.copytree(bed / "model", tmp_path / "bed" / "model")
    shutil.copy(other, tmp_path / "bed" / "pairs.jsonl")
    shutil.copytree(aligned, tmp_path / "run")
    options = {"model": bed / "model", "data": bed / "pairs.jsonl"}
    assert "belongs to another run: data is" in refused(align(bed, aligned, **(SIX | {"data": other})), capsys)
    assert main(align(bed, aligned, **(SIX | options | {"log_every": 3}))) == 0  # nothing learned depends on it
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "is no run" in refused(align(bed, tmp_path / "mine"), capsys)


def test_a_run_that_got_nowhere_is_begun_anew(bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(1, patch, interrupt)
        assert main(align(bed, tmp_path / "run")) == 130
    assert main(align(bed, tmp_path / "run", beta=0.5)) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["beta"] == 0.5


# -- data ------------------------------------------------------------------------------------------


def rows(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def test_prompts_of_every_kind(tiny_tokenizer: Any) -> None:
    asked = [{"role": "user", "content": "w5"}]
    answered = [*asked, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"}]
    foreign = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
    tokenizer = with_template(tiny_tokenizer)
    assert prompts(rows({"prompt": "w5", "text": "w6"}), tokenizer)["prompt"][0] == "w5"
    for column, value in (("prompt", asked), ("messages", answered), ("conversations", foreign)):
        assert prompts(rows({column: value, "other": 1}), tokenizer)[0] == {"prompt": asked}
    system = prompts(rows({"messages": answered}), tokenizer, system_prompt="w9")[0]["prompt"]
    assert system == [{"role": "system", "content": "w9"}, *asked]
    texts = rows({"text": "w5 w6 w7"}, {"text": "w8"})
    assert prompts(texts, tokenizer, prompt_tokens=2)["prompt"][:] == ["w5 w6"]


@pytest.mark.parametrize("command", ["align", "distill", "distill texts"])
def test_examples_that_are_left_out_are_counted_on_the_screen(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    pair = {"prompt": "w5", "chosen": " w6", "rejected": " w7", "text": "w5 w6 w7 w8"}
    long = {"prompt": " ".join(["w5"] * 20), "text": "w5"}
    data = write(tmp_path / "data.jsonl", [pair] * 8 + [pair | long] * 3)
    match command:
        case "align":
            options, said = align(bed, tmp_path / "o", data=data, max_length=10), "prompt has 10 tokens or more"
        case "distill":
            options, said = distill(bed, tmp_path / "o", data=data, max_prompt_length=9), "prompt has 10 tokens or more"
        case _:
            texts = write(tmp_path / "t.jsonl", [{"text": row["text"]} for row in [pair] * 8 + [pair | long] * 3])
            options = distill(bed, tmp_path / "o", data=texts, prompt_tokens=3)
            said = "have less than 3 tokens"
    assert main([*options, "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trimtab: 3 of 11 ")]
    assert len(lines) == 1
    assert lines[0].endswith(said)
    short = write(tmp_path / "short.jsonl", [pair] * 8)
    assert main([*align(bed, tmp_path / "p", data=short, max_length=10), "--dry_run"]) == 0
    assert "left out" not in capsys.readouterr().err


def with_template(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = TEMPLATE
    return copied


def test_pairs_without_a_prompt_share_their_beginning(tiny_tokenizer: Any) -> None:
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "w5"), ("assistant", "w6"), ("assistant", "w7")))
    pair = preference_pairs(rows({"chosen": [user, good], "rejected": [user, bad]}), with_template(tiny_tokenizer))[0]
    assert pair == {"prompt": [user], "chosen": [good], "rejected": [bad]}


def test_kto_takes_its_pairs_apart_in_a_random_order(tiny_tokenizer: Any) -> None:
    pairs = rows(*({"prompt": f"w{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(40)))
    apart = labelled_completions(pairs, tiny_tokenizer, seed=0)
    assert {(row["prompt"][1:], row["completion"], row["label"]) for row in apart} == {
        (str(i), f"{kind}{i}", kind == "c") for i in range(40) for kind in "cr"
    }
    labels = apart["label"][:]
    assert min(sum(labels[i : i + 20]) for i in range(0, 80, 20)) >= 4  # no part of one kind only
    numbers = rows({"prompt": "w1", "completion": "w2", "label": 1}, {"prompt": "w1", "completion": "w2", "label": 0})
    assert sorted(labelled_completions(numbers, tiny_tokenizer, seed=0)["label"]) == [False, True]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ""])
def test_every_kind_of_file_gives_the_same_examples(bed: Path, tmp_path: Path, suffix: str) -> None:
    from trimtab.cli.examples import DataSettings, load_examples

    table = datasets.Dataset.from_list([{"prompt": "None", "chosen": "w1", "rejected": "w2"}] * 3)
    path = tmp_path / f"data[1]{suffix}"
    match suffix:
        case ".jsonl":
            table.to_json(path)
        case ".json":
            path.write_text(json.dumps(table.to_list()))
        case ".csv":
            table.to_csv(path)
        case ".parquet":
            table.to_parquet(path)
        case _:
            datasets.DatasetDict({"train": table}).save_to_disk(str(path))
    assert load_examples(DataSettings(data=str(path)), seed=0).to_list() == table.to_list()
    assert len(load_examples(DataSettings(data=str(path), examples=2), seed=0)) == 2


# -- plans and configurations ----------------------------------------------------------------------


def test_dry_runs_say_what_would_be_and_write_nothing(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*align(bed, tmp_path / "o", **SIX), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "12 examples of 4 a step, 6 steps" in shown
    assert "reference hard, 3 updates" in shown
    assert re.search(r"time +\d+\.\d min", shown)
    assert all(word in shown for word in ("memory", "policy", "optimiser", "reference", "disk", "checkpoints"))
    assert main([*align(bed, tmp_path / "o", tau=4, reference="hard"), "--dry_run"]) == 0
    assert "0 updates: it never moves" in capsys.readouterr().out
    assert main([*distill(bed, tmp_path / "o", warmup_steps=2), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "12 prompts of at most 6 tokens, 4 answers a step, 3 steps" in shown
    assert "the teacher writes along in 2 of them" in shown
    assert list(tmp_path.iterdir()) == []


def test_epochs_are_counted_as_the_trainer_counts_them(bed: Path, tmp_path: Path) -> None:
    options = {"steps": None, "epochs": 1.5, "batch_size": 5, "gradient_accumulation": 2}
    assert main(align(bed, tmp_path / "run", **options)) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 3  # 3 batches: 2 steps a pass
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["last"]["epoch"] == pytest.approx(1.5, abs=0.4)


CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_are_accepted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = path.stem.partition("-")[0]
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    assert "learning_rate" in capsys.readouterr().out
    if "paper" in path.stem:
        assert "not run here" in path.read_text()


def test_the_committed_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    short = ["--steps", "2", "--learning_rate_warmup", "0"]
    assert main(["align", "--config", "examples/align-micro.yaml", "--out", str(tmp_path / "a"), *short]) == 0
    teacher = ["--teacher", str(tmp_path / "a" / "model"), "--max_completion_length", "8", "--warmup_steps", "1"]
    options = ["distill", "--config", "examples/distill-micro.yaml", "--out", str(tmp_path / "d"), *teacher, *short]
    assert main(options) == 0


def test_the_committed_stories_are_what_the_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "stories.py"), run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "examples" / "stories.jsonl").read_text()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nobody/nothing"}, r"model='nobody/nothing' cannot be loaded"),
        ({"data": "none.jsonl"}, r"data='none\.jsonl' does not exist"),
        ({"data": "nobody/nothing"}, r"data='nobody/nothing' is neither a file nor a dataset"),
        ({"data": "{bed}/template.jinja"}, r"data's extension='\.jinja' is not known.*Accepted: \.jsonl"),
        ({"data": "{bed}/model"}, r"is a folder; accepted: one that datasets' save_to_disk wrote"),
        ({"data": "{bed}/texts.jsonl"}, r"data has the columns 'text'; accepted: prompt, chosen, rejected"),
        ({"data": "{bed}/labelled.jsonl"}, r"columns 'prompt', 'completion', 'label'; accepted: prompt, chosen"),
        ({"data": "{bed}/texts.jsonl", "loss": "kto"}, r"'text'; accepted: prompt, completion, label; or pairs"),
        ({"data": "{bed}/chat.jsonl"}, r"holds conversations, and the tokenizer has no chat template"),
        ({"data": "{bed}/chat.jsonl", "chat_template": "none.jinja"}, r"none\.jinja"),
        ({"examples": "13"}, r"examples=13, but data=.* holds 12"),
        ({"examples": "0"}, r"examples=0 must be at least 1"),
        ({"max_length": "3"}, r"every prompt of the data has 3 tokens or more"),
        ({"max_length": "0"}, r"max_length=0 must be positive"),
        ({"beta": "-1"}, r"beta=-1\.0 must be positive"),
        ({"loss": "kto", "batch_size": "1"}, r"batch_size=1: kto pairs"),
        ({"loss": "kto", "batch_size": "25"}, r"24 examples do not fill one batch, which takes 25"),
        ({"ipo_form": "sums"}, r"ipo_form='sums' has no meaning for loss='dpo'"),
        ({"desirable_weight": "2"}, r"have no meaning for loss='dpo'"),
        ({"alpha": "0.5"}, r"alpha=0\.5 has no meaning for reference='fixed'; accepted with: soft, mixed, every"),
        ({"reference": "soft", "tau": "3"}, r"tau=3 has no meaning for reference='soft'"),
        ({"reference": "soft", "alpha": "1.5"}, r"alpha"),
        ({"reference": "hard", "tau": "0"}, r"tau"),
        ({"reference": "every"}, r"reference='every' needs every"),
        ({"reference": "every", "every": "1.5"}, r"every=1\.5 must lie in"),
        ({"reference": "soft", "lora_soft": "exact"}, r"lora_soft='exact' has no meaning without adapters"),
        ({"measure": True}, r"measure has no meaning for reference='fixed'"),
        ({"steps": "0"}, r"steps=0 must be at least 1"),
        ({"keep_last": "1"}, r"keep_last=1 must be at least 2"),
        ({"learning_rate": "0"}, r"learning_rate=0\.0 must be finite and positive"),
        ({"learning_rate_warmup": "3"}, r"learning_rate_warmup=3 must be below the run's 3 steps"),
        ({"lora_alpha": "4"}, r"lora_alpha=4\.0 must be positive, and needs lora_rank"),
    ],
)
def test_align_refuses_bad_input_in_one_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    filled = {name: value.format(bed=bed) if isinstance(value, str) else value for name, value in changes.items()}
    assert re.search(message, refused(align(bed, tmp_path / "o", **filled), capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "nobody/nothing"}, r"model='nobody/nothing' cannot be loaded"),
        (
            {"data": "{bed}/texts.jsonl"},
            r"columns 'text'; accepted: prompt; messages or conversations; or text together",
        ),
        ({"data": "{bed}/texts.jsonl", "prompt_tokens": "99"}, r"prompt_tokens=99: every text of the data is shorter"),
        ({"prompt_tokens": "4"}, r"prompt_tokens=4 is for a column text"),
        ({"system_prompt": "w1"}, r"system_prompt is for conversations"),
        ({"epsilon": "-1"}, r"epsilon=-1"),
        ({"rollouts": "skd", "epsilon": "0.1"}, r"epsilon=0\.1 has no meaning for rollouts='skd'"),
        ({"rollouts": "vanilla", "warmup_steps": "3"}, r"warmup_steps=3 has no meaning for rollouts='vanilla'"),
        ({"max_prompt_length": "60"}, r"max_prompt_length=60 and max_completion_length=6 are beyond"),
        ({"max_completion_length": "0"}, r"max_completion_length=0 must be at least 1"),
        ({"completions_per_prompt": "3"}, r"completions_per_prompt=3 must divide the 4 answers"),
        ({"gradient_accumulation": "7"}, r"12 examples do not fill the batches of one step, which takes 14"),
        ({"loss_top_k": "0", "loss_estimator": "topk_pg"}, r"top_k=0"),
    ],
)
def test_distill_refuses_bad_input_in_one_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    filled = {name: value.format(bed=bed) for name, value in changes.items()}
    assert re.search(message, refused(distill(bed, tmp_path / "o", **filled), capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "chosen": "w2", "rejected": None}, r"column 'rejected' is empty in 1 examples"),
        (
            {"prompt": "w1", "chosen": 3, "rejected": "w2"},
            r"column 'chosen' holds int \(3\); accepted: text, or a list",
        ),
        ({"prompt": "w1", "chosen": talk("chosen", "w2"), "rejected": talk("chosen", "w3")}, r"text in 'prompt', conv"),
    ],
)
def test_pairs_that_are_none_are_refused(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], message: str
) -> None:
    given = [row] if None not in row.values() else [dict.fromkeys(row, "w1"), row]
    data = write(tmp_path / "data.jsonl", given)
    assert re.search(message, refused(align(bed, tmp_path / "o", data=data), capsys))


def test_labels_that_are_none_are_refused(bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for labels, message in (((0, 2), r"column 'label' holds 0, 2"), ((True, True), r"is True everywhere")):
        data = write(tmp_path / "data.jsonl", [{"prompt": "w1", "completion": "w2", "label": x} for x in labels])
        assert re.search(message, refused(align(bed, tmp_path / "o", data=data, loss="kto"), capsys))


def test_files_that_are_none_are_refused(bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in ((b"", r"holds no example"), (b"{nonsense", r"cannot be read")):
        (tmp_path / "data.jsonl").write_bytes(content)
        assert re.search(message, refused(align(bed, tmp_path / "o", data=tmp_path / "data.jsonl"), capsys))


def test_a_masked_model_is_refused(
    micro_bert: Path, bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no causal language model" in refused(align(bed, tmp_path / "o", model=micro_bert), capsys)
