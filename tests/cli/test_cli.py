"""The command line, end to end on a tiny model, and what it answers to bad input and interrupts."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.cli import main
from trimtab.cli.models import load_model
from trimtab.core import checkpoint, files
from trimtab.core.interrupts import Interruptible
from trimtab.core.progress import Progress
from trimtab.gallery.dictionary_page import DictionaryPage
from trimtab.sae import HarvestConfig, JumpReLUSAE, TopKSAE

FILES = ["history.json", "run.json"]
METRICS = {
    "tokens",
    "explained_variance",
    "explained_variance_without_top_dimension",
    "explained_variance_legacy",
    "l0",
    "dead_fraction",
    "ce_tokens",
    "ce_clean",
    "ce_spliced",
    "ce_ablated",
    "ce_recovered",
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a tiny saved model and two texts."""
    folder = tmp_path_factory.mktemp("bed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    chance = random.Random(0)
    for name in ("train", "held-out"):
        lines = [" ".join(f"w{chance.randrange(60)}" for _ in range(12)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def command(bed: Path, out: Path, **changes: str) -> list[str]:
    """`sae train` with options that take a second."""
    options = {
        "model": str(bed / "model"),
        "text": str(bed / "train.txt"),
        "places": "resid.0 mlp.1",
        "out": str(out),
        "n_latents": "48",
        "k": "4",
        "tokens": "1500",
        "batch_size": "100",
        "dead_after": "300",
        "context": "32",
        "shard_tokens": "256",
        "checkpoint_every": "5",
    } | changes
    return ["sae", "train", *(word for name, value in options.items() for word in (f"--{name}", *value.split(" ")))]


@pytest.fixture(scope="module")
def trained(bed: Path) -> Path:
    """A finished run."""
    out = bed / "run"
    assert main(command(bed, out)) == 0
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """One dictionary of it, to be spoilt."""
    ignored = shutil.ignore_patterns("evaluation.json", "latents.json", "report.html")
    shutil.copytree(trained / "resid.0", tmp_path / "resid.0", ignore=ignored)
    return tmp_path / "resid.0"


def weights(out: Path, name: str = "resid.0") -> dict[str, torch.Tensor]:
    return load_file(out / name / "sae_weights.safetensors")


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
    assert captured.err.endswith(line + "\n")
    return line


# -- methods ---------------------------------------------------------------------------------------


def test_methods_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "19 methods" in shown
    assert "topk" in shown.lower()


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == len({entry["slug"] for entry in entries}) == 19
    for entry in entries:
        assert {"slug", "family", "entry_point", "arxiv", "available"} <= entry.keys()
        assert isinstance(entry["available"], bool)
        assert re.fullmatch(r"\d{4}\.\d{4,5}", entry["arxiv"])


# -- train, eval, explain, show --------------------------------------------------------------------


def test_train_writes_dictionaries_checkpoints_and_history(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == sorted(["checkpoints", *FILES, "mlp.1", "resid.0"])
    for name in ("resid.0", "mlp.1"):
        files = sorted(path.name for path in (trained / name).iterdir() if path.suffix != ".html")
        assert {"README.md", "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"} <= set(files)
        sae = TopKSAE.from_pretrained(trained / name)
        assert (sae.config.n_latents, sae.config.k, sae.config.d_in) == (48, 4, 32)
        assert sae.config.metadata["trimtab"]["place"] == name
    assert json.loads((trained / "history.json").read_text())[-1]["step"] == 15
    assert checkpoint.load(trained / "checkpoints").step == 15


def test_train_says_what_came_out(bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"n_latents": "16 24", "k": "2", "seeds": "0 1", "places": "embed"}
    assert main(command(bed, tmp_path / "o", tokens="300", **sizes)) == 0
    shown = capsys.readouterr().out
    assert "trained on 300 tokens" in shown
    names = [f"embed-n{n}-k2-s{seed}" for n in (16, 24) for seed in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(["checkpoints", *names, *FILES])


def test_a_transcoder_is_trained_and_measured(bed: Path, tmp_path: Path) -> None:
    assert main(command(bed, tmp_path, places="resid.0", target="mlp.1", tokens="300")) == 0
    directory = tmp_path / "resid.0-to-mlp.1"
    assert main(["sae", "eval", str(directory), "--text", str(bed / "held-out.txt")]) == 0
    assert json.loads((directory / "evaluation.json").read_text()).keys() == METRICS


def test_eval_measures_and_writes(bed: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "eval", str(trained / "resid.0"), "--text", str(bed / "held-out.txt"), "--tokens", "200"]) == 0
    found = json.loads((trained / "resid.0" / "evaluation.json").read_text())
    assert found.keys() == METRICS
    assert 0 < found["explained_variance"] < 1
    assert found["tokens"] <= 224
    shown = capsys.readouterr().out
    assert all(name in shown for name in METRICS)


def test_explain_writes_latents_and_the_page(bed: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sae", "explain", str(trained / "mlp.1"), "--text", str(bed / "held-out.txt"), "--n_latents", "7"]
    assert main(arguments) == 0
    assert "7 latents:" in capsys.readouterr().out
    page = DictionaryPage.from_json((trained / "mlp.1" / "latents.json").read_text())
    assert len(page.latents) == 7
    assert page.curves.keys() == {"explained variance (training batches)", "dead fraction"}
    assert page.selection in (trained / "mlp.1" / "report.html").read_text()


def test_show_names_the_latents_of_every_token(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "show", str(trained / "resid.0"), "--prompt", "w1 w2", "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"'<bos>'\s*│ \(not read\)", shown)
    assert re.search(r"'w1'\s*│ \d+: [\d.]+  \d+: [\d.]+ ", shown)
    assert "'w2'" in shown


def test_the_model_is_loaded_as_in_training_unless_told(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(bed, tmp_path, dtype="bfloat16", layers="model.layers")) == 0
    asked: list[tuple[str, bool, str | None]] = []

    def load(name: str, dtype: str, *, trust_remote_code: bool) -> Any:
        asked.append((dtype, trust_remote_code, None))
        return load_model(name, dtype, trust_remote_code=trust_remote_code)

    def latents(*arguments: Any, place: str, layers: str | None) -> list[Any]:
        asked[-1] = (*asked[-1][:2], layers)
        return []

    monkeypatch.setattr("trimtab.cli.sae.load_model", load)
    monkeypatch.setattr("trimtab.cli.sae.latents_of_text", latents)
    show = ["sae", "show", str(tmp_path / "resid.0"), "--prompt", "w1 w2"]
    assert main(show) == 0
    assert main([*show, "--dtype", "float32", "--layers", "other", "--trust_remote_code"]) == 0
    assert asked == [("bfloat16", False, "model.layers"), ("float32", True, "other")]


def test_a_dictionary_is_boosted_and_fine_tuned_from_the_command_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholds = {"sparsifier": "batch_topk", "places": "resid.0"}
    assert main(command(bed, tmp_path / "base", **thresholds)) == 0
    base = str(tmp_path / "base" / "resid.0")
    more = {"base": base, "places": "resid.0", "replay_text": str(bed / "held-out.txt"), "replay_share": "0.2"}
    assert main(command(bed, tmp_path / "new", n_latents="8", k="2", **more)) == 0
    assert main(command(bed, tmp_path / "tuned", start=base, **thresholds)) == 0
    inside = {"extend": base, "extend_init": "most_active", "freeze_decoder": "true", "n_latents": "80"}
    assert main(command(bed, tmp_path / "extended", **thresholds, **inside)) == 0
    extended, old = (TopKSAE.from_pretrained(path) for path in (tmp_path / "extended" / "resid.0", base))
    assert torch.equal(extended.decoder[: old.config.n_latents], old.decoder)
    assert extended.config.n_latents == 80
    dial = ["sae", "eval", str(tmp_path / "dial" / "resid.0"), "--k", "2", "--budgets", "1", "2", "4"]
    assert main(command(bed, tmp_path / "dial", places="resid.0", objective="hierarchical")) == 0
    assert main([*dial, "--text", str(bed / "held-out.txt"), "--tokens", "500", "--ce_tokens", "100"]) == 0
    measured = json.loads((tmp_path / "dial" / "resid.0" / "evaluation.json").read_text())
    assert measured["explained_variance"] == pytest.approx(measured["explained_variance_at_2"], abs=1e-5)
    assert measured["l0"] <= measured["k"] == 2
    new = TopKSAE.from_pretrained(tmp_path / "new" / "resid.0")
    assert isinstance(new, JumpReLUSAE)
    assert new.config.metadata["trimtab"]["activations"]["mixed"][0]["share"] == 0.2
    text = ["--text", str(bed / "held-out.txt"), "--tokens", "500", "--ce_tokens", "100"]
    variances = []
    for directory in (base, str(tmp_path / "new" / "resid.0")):  # the latter together with its base
        assert main(["sae", "eval", directory, *text]) == 0
        variances.append(json.loads((Path(directory) / "evaluation.json").read_text())["explained_variance"])
    assert variances[1] > variances[0] - 0.05
    assert main(["sae", "show", base, "--prompt", "w1 w2"]) == 0
    assert "at most" not in capsys.readouterr().out
    assert main(["sae", "score", base, "--text", str(bed / "held-out.txt"), "--tokens", "2000", "--latents", "3"]) == 0
    scores = json.loads((Path(base) / "scores.json").read_text())
    assert 1 <= len(scores) <= 3
    assert all(0 <= row[name] <= 1 for row in scores for name in ("detection", "fuzzing"))
    assert main(["sae", "stitch", base, str(tmp_path / "new" / "resid.0"), "--out", str(tmp_path / "one")]) == 0
    assert TopKSAE.from_pretrained(tmp_path / "one").config.n_latents == 48 + 8
    assert "was not trained with --base" in refused(["sae", "stitch", base, base, "--out", "x"], capsys)
    dial_ = str(tmp_path / "dial" / "resid.0")
    assert "must lie between 1 and" in refused(["sae", "eval", dial_, "--text", "x", "--budgets", "9"], capsys)
    assert "accepted: one trained with --base" in refused(["sae", "stitch", base, dial_, "--out", "x"], capsys)
    more["encoder_input"] = "error"
    assert main(command(bed, tmp_path / "of-error", n_latents="8", k="2", **more)) == 0
    directory = str(tmp_path / "of-error" / "resid.0")
    assert main(["sae", "eval", directory, *text]) == 0
    found = json.loads((Path(directory) / "evaluation.json").read_text())["explained_variance"]
    assert found > variances[0] - 0.05
    assert "reads the error" in refused(["sae", "show", directory, "--prompt", "w1 w2"], capsys)


@pytest.mark.parametrize(
    "options", [{"kron": "2 4"}, {"objective": "hierarchical", "budgets": "1 4"}, {"sparsifier": "jumprelu"}]
)
def test_every_kind_is_trained_from_the_command_line(bed: Path, tmp_path: Path, options: dict[str, str]) -> None:
    assert main(command(bed, tmp_path, places="resid.0", **options)) == 0
    kind = TopKSAE.from_pretrained(tmp_path / "resid.0").config.metadata["trimtab"]["dictionary"]
    assert all(kind[name] is not None for name in options)


def test_a_moved_dictionary_needs_no_history(bed: Path, copied: Path) -> None:
    (copied.parent / "history.json").write_text("[]")
    renamed = copied.rename(copied.with_name("mine"))
    assert main(["sae", "explain", str(renamed), "--text", str(bed / "held-out.txt"), "--n_latents", "3"]) == 0
    assert (renamed / "report.html").exists()


def test_a_run_begun_again_is_finished_already(bed: Path, trained: Path) -> None:
    before = (trained / "resid.0" / "sae_weights.safetensors").read_bytes()
    shutil.copytree(trained / "checkpoints", bed / "again" / "checkpoints")
    assert main(command(bed, bed / "again")) == 0
    assert (bed / "again" / "resid.0" / "sae_weights.safetensors").read_bytes() == before


def test_with_a_cache_the_same_weights_and_the_shards_stay(bed: Path, trained: Path, tmp_path: Path) -> None:
    assert main(command(bed, tmp_path / "o", cache=str(tmp_path / "cache"))) == 0
    assert equal(tmp_path / "o", trained)
    assert (tmp_path / "cache" / "shard-000003.safetensors").exists()


def test_another_run_does_not_go_into_the_same_directory(
    bed: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(command(bed, trained, learning_rate="0.01"), capsys)
    assert "belongs to another run" in line
    assert "learning_rate is 0.0008 there, expected 0.01" in line


# -- configuration ---------------------------------------------------------------------------------


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_gives_the_same_run(
    bed: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_config(command(bed, tmp_path / "o"), capsys)
    (tmp_path / "run.yaml").write_text(printed)
    assert not (tmp_path / "o").exists()
    assert printed_config(["sae", "train", "--config", str(tmp_path / "run.yaml")], capsys) == printed
    assert main(["sae", "train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert equal(tmp_path / "o", trained)


def test_options_stand_over_the_configuration(bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(printed_config(command(bed, tmp_path / "o", tokens="300"), capsys))
    assert main(["sae", "train", "--config", str(tmp_path / "run.yaml"), "--k", "3", "--places", "embed"]) == 0
    assert TopKSAE.from_pretrained(tmp_path / "o" / "embed").config.k == 3


@pytest.mark.parametrize(
    "content", ["no_such_option: 3\n", "k: [many]\n", "tokens: [\n", "- 1\n"], ids=["unknown", "type", "yaml", "list"]
)
def test_a_configuration_that_is_none_is_refused(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([*command(bed, tmp_path / "o"), "--config", str(tmp_path / "run.yaml")])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_dry_run_says_what_would_be_and_writes_nothing(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bed.rglob("*"))
    arguments = [*command(bed, tmp_path / "o", cache=str(tmp_path / "cache")), "--dry_run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "would train 2 dictionaries (resid.0, mlp.1) on 1,500 tokens" in shown
    assert all(word in shown for word in ("min", "MiB", "disk", "memory"))
    assert list(tmp_path.iterdir()) == []
    assert sorted(bed.rglob("*")) == before


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": "resid.9"}, r"place='resid\.9' is not known\. Did you mean resid"),
        ({"places": "residual"}, r"place='residual' is not known"),
        ({"places": "resid.0 resid.0"}, r"'resid\.0-n48-k4-s0' twice"),
        ({"target": "resid.0"}, r"target='resid\.0' is the place itself"),
        ({"text": "none.txt"}, r"text source 'none\.txt' does not exist"),
        ({"text": "nobody/nothing"}, r"'nobody/nothing' is neither a file, a folder, nor a dataset"),
        ({"model": "nobody/nothing"}, r"model='nobody/nothing' cannot be loaded"),
        ({"model": "none"}, r"model='none' cannot be loaded"),
        ({"k": "49"}, r"k=49 must lie between 1 and n_latents=48"),
        ({"n_latents": "0"}, r"n_latents=0 must be a whole number of at least 1"),
        ({"tokens": "50"}, r"tokens=50 is less than one batch"),
        ({"context": "1"}, r"context=1 leaves no room"),
        ({"kron": "4"}, r"kron=\[4\]; accepted: two numbers, m and n"),
        ({"kron": "5 7"}, r"n_latents=48 a multiple of m x n"),
        ({"objective": "matryoshka", "budgets": "8 16"}, r"accepted for matryoshka: rising lengths that end in"),
        ({"context": "65"}, r"context=65 is beyond the model's 64 positions"),
        ({"sink_norm_ratio": "0.5"}, r"sink_norm_ratio=0\.5 must be above 1"),
        ({"layers": "model.blocks"}, r"layers"),
    ],
)
def test_train_refuses_bad_input_in_one_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    assert re.search(message, refused(command(bed, tmp_path / "o", **changes), capsys))
    assert {path.name for path in tmp_path.rglob("*")} <= {"o", "run.json"}


def test_text_that_is_not_utf8_or_empty_is_refused_in_one_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes("w1 caf\xe9".encode("latin-1"))
    line = refused(command(bed, tmp_path / "o", text=str(tmp_path / "latin.txt")), capsys)
    assert "latin.txt' is not UTF-8: byte 0xe9 at offset 6" in line
    (tmp_path / "empty.txt").touch()
    assert "is empty" in refused(command(bed, tmp_path / "o", text=str(tmp_path / "empty.txt")), capsys)


Spoil = Callable[[Path], object]
SPOILT_MODELS: dict[str, Spoil] = {
    "no-weights": lambda model: (model / "model.safetensors").unlink(),
    "cut-weights": lambda model: (model / "model.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes()[:5000]
    ),
    "no-config": lambda model: (model / "config.json").unlink(),
    "broken-config": lambda model: (model / "config.json").write_text("{"),
    "other-width": lambda model: (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    ),
    "wrong-type": lambda model: (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": "wide"')
    ),
    "unknown-type": lambda model: (model / "config.json").write_text('{"model_type": "nonsense"}'),
    "no-tokenizer": lambda model: [path.unlink() for path in model.glob("*token*")],
}


@pytest.mark.parametrize("name", SPOILT_MODELS)
def test_a_spoilt_model_is_refused_in_one_line(
    bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(bed / "model", tmp_path / "model")
    SPOILT_MODELS[name](tmp_path / "model")
    line = refused(command(bed, tmp_path / "o", model=str(tmp_path / "model")), capsys)
    assert "model' cannot be loaded" in line


def rewrite(directory: Path, **changes: Any) -> None:
    fields = json.loads((directory / "cfg.json").read_text())
    (directory / "cfg.json").write_text(json.dumps(fields | changes))


def with_metadata(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metadata = json.loads((directory / "cfg.json").read_text())["metadata"]
    change(metadata)
    rewrite(directory, metadata=metadata)


HOSTILE: dict[str, Spoil] = {
    "huge": lambda d: rewrite(d, d_sae=10**15),
    "negative": lambda d: rewrite(d, k=-1),
    "text-for-number": lambda d: rewrite(d, d_in="32"),
    "architecture": lambda d: rewrite(d, architecture="../../etc/passwd"),
    "other-shape": lambda d: rewrite(d, d_sae=49),
    "no-json": lambda d: (d / "cfg.json").write_text("{" * 5000),
    "a-list": lambda d: (d / "cfg.json").write_text("[]"),
    "no-metadata": lambda d: rewrite(d, metadata={}),
    "metadata-number": lambda d: with_metadata(d, lambda m: m.update(trimtab=5)),
    "place-number": lambda d: with_metadata(d, lambda m: m["trimtab"].update(place=5)),
    "place-path": lambda d: with_metadata(d, lambda m: m["trimtab"].update(place="../../x")),
    "place-absent": lambda d: with_metadata(d, lambda m: m["trimtab"].update(place="resid.77")),
    "target-list": lambda d: with_metadata(d, lambda m: m["trimtab"].update(target=["x"])),
    "model-path": lambda d: with_metadata(d, lambda m: m.update(model_name="../../x")),
    "no-model": lambda d: with_metadata(d, lambda m: m.pop("model_name")),
    "harvest-unknown": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"].update(harvest={"bogus": 1})),
    "harvest-huge": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"]["harvest"].update(context=10**12)),
    "harvest-type": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"]["harvest"].update(context=2.5)),
    "harvest-words": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"]["harvest"].update(context="x")),
    "dtype-unknown": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"].update(model_dtype="int1")),
    "layers-list": lambda d: with_metadata(d, lambda m: m["trimtab"]["activations"].update(layers=[1])),
    "cut-weights": lambda d: (d / "sae_weights.safetensors").write_bytes(b"abc"),
    "no-weights": lambda d: (d / "sae_weights.safetensors").unlink(),
}


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = files._flush

    def full(path: Path) -> None:
        if "step-00000010" in str(path):
            raise OSError(28, "No space left on device")
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        assert "No space left on device" in refused(command(bed, tmp_path / "o"), capsys)
    assert checkpoint.latest(tmp_path / "o" / "checkpoints").name == "step-00000005"
    assert main(command(bed, tmp_path / "o")) == 0  # and the run goes on


def test_a_report_on_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds neither" in refused(["gallery", "report", str(tmp_path)], capsys)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_dictionary_is_refused_in_one_line(
    bed: Path, copied: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    HOSTILE[name](copied)
    assert refused(["sae", "eval", str(copied), "--text", str(bed / "held-out.txt")], capsys)
    assert not (copied / "evaluation.json").exists()


def test_activations_metadata_of_another_kind_gives_the_defaults(
    bed: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_metadata(copied, lambda metadata: metadata["trimtab"].update(activations=[1]))
    assert HarvestConfig().context == 256
    line = refused(["sae", "eval", str(copied), "--text", str(bed / "held-out.txt")], capsys)
    assert "context=256 is beyond the model's 64 positions" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{bed}/none", "--text", "{bed}/held-out.txt"], r"none"),
        (["eval", "{bed}/held-out.txt", "--text", "{bed}/held-out.txt"], r"is a file"),
        (["eval", "{bed}", "--text", "{bed}/held-out.txt"], r"has no cfg\.json there"),
        (["eval", "{run}/resid.0", "--text", "{bed}/held-out.txt", "--tokens", "0"], r"tokens=0 must be at least 1"),
        (["explain", "{run}/resid.0", "--text", "{bed}/held-out.txt", "--n_latents", "2001"], r"between 1 and 2000"),
        (["explain", "{run}/resid.0", "--text", "{bed}/none.txt"], r"does not exist"),
        (["show", "{run}/resid.0", "--prompt", ""], r"text='' holds no token to read"),
        (["show", "{run}/resid.0", "--prompt", "w1", "--model", "nobody/nothing"], r"cannot be loaded"),
    ],
)
def test_the_other_commands_refuse_bad_input_in_one_line(
    bed: Path, trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [word.format(bed=bed, run=trained) for word in arguments]
    assert re.search(message, refused(["sae", *filled], capsys))


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["sae"],
        ["sae", "bogus"],
        ["sae", "train"],
        ["sae", "train", "--tokens", "many"],
        ["sae", "eval"],
        ["methods", "--bogus"],
    ],
)
def test_what_cannot_be_parsed_is_refused_with_the_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "usage: trimtab" in message
    assert "Traceback" not in message


# -- interrupts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_within_a_step_leaves_a_checkpoint_from_which_the_run_goes_on(
    bed: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    steps = []
    advance = Progress.advance

    def interrupted(self: Progress, units: int, note: str = "") -> None:
        advance(self, units, note)
        steps.append(units)
        if len(steps) == 8:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupted)
        assert main(command(bed, tmp_path)) == 130
    assert capsys.readouterr().err.endswith("trimtab: interrupted\n")
    assert checkpoint.load(tmp_path / "checkpoints").step == 8
    assert not (tmp_path / "resid.0").exists()
    assert main(command(bed, tmp_path)) == 0
    assert equal(tmp_path, trained)


def test_an_interrupt_between_a_batch_and_its_step_loses_no_activation(
    bed: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    whole = Interruptible.whole

    def interrupted(self: Interruptible) -> Any:
        begun.append(self)
        if len(begun) == 8:
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Interruptible, "whole", interrupted)
        assert main(command(bed, tmp_path)) == 130
    assert checkpoint.load(tmp_path / "checkpoints").step == 7
    assert main(command(bed, tmp_path)) == 0
    assert equal(tmp_path, trained)


def test_an_interrupt_while_harvesting_loses_no_activation(bed: Path, trained: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from trimtab.cli import main\n"
        "from trimtab.sae.harvest import Harvest\n"
        "shard = Harvest.shard\n"
        "def waiting(self, index):\n"
        "    if index == 3:\n"
        "        print('harvesting', flush=True)\n"
        "        time.sleep(60)\n"
        "    return shard(self, index)\n"
        "Harvest.shard = waiting\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command(bed, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "harvesting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "trimtab: interrupted"
    assert "Traceback" not in errors
    assert 0 < checkpoint.load(tmp_path / "checkpoints").step < 15
    assert main(command(bed, tmp_path)) == 0
    assert equal(tmp_path, trained)


# -- lightness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import trimtab",
        "from trimtab.cli import main; main(['--help'])",
        "from trimtab.cli import main; main([])",
        "from trimtab.cli import main; main(['methods'])",
    ],
)
def test_what_should_be_light_imports_no_heavy_library(statement: str) -> None:
    program = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["methods", "sae", "gallery", "demo"]),
        (["sae", "--help"], ["train", "eval", "explain", "show"]),
        (["sae", "train", "--help"], ["--places", "--tokens", "--sink_norm_ratio", "activations to read"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert [word for word in words if word not in shown] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"trimtab \d+\.\d+\.\d+\n", capsys.readouterr().out)
