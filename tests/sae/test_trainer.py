"""Training: what it learns, what it refuses, and that a killed run ends with the very same weights."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from torch import Tensor

from trimtab.core import checkpoint
from trimtab.core.errors import TrimtabError
from trimtab.sae import DictionaryConfig, TensorShards, TopKSAE, TrainingConfig, train
from trimtab.sae.learner import Learner
from trimtab.sae.metrics import ReconstructionMeter, ev_curve
from trimtab.sae.trainer import dictionary_names


def sparse_rows(n_rows: int, *, d: int = 24, atoms: int = 40, seed: int = 0, scale: float = 30.0) -> Tensor:
    """Rows that are sums of three of `atoms` directions, far from the origin and far from unit scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(atoms, d, generator=torch.Generator().manual_seed(99)), dim=-1
    )
    chosen = torch.rand(n_rows, atoms, generator=generator).topk(3, dim=-1).indices
    weights = torch.zeros(n_rows, atoms).scatter(-1, chosen, 0.5 + torch.rand(n_rows, 3, generator=generator))
    return scale * (weights @ directions + 2.0)


def config(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {"tokens": 40_000, "batch_size": 100, "learning_rate": 2e-2, "dead_after": 2_000}
    return TrainingConfig(**(values | changes))  # type: ignore[arg-type]


def explained_variance(sae: TopKSAE, rows: Tensor, target: Tensor | None = None) -> float:
    target = rows if target is None else target
    meter = ReconstructionMeter(target.shape[1], sae.config.n_latents)
    with torch.no_grad():
        latents = sae.encode_sparse(rows)
        meter.update(target, sae.decode_sparse(latents), latents.indices[latents.values > 0])
    value: float = meter.results()["explained_variance"]
    return value


DICTIONARY = DictionaryConfig(place="x", n_latents=64, k=3)


def test_learns_a_sparse_code_and_is_written_in_the_units_of_the_activations(tmp_path: Path) -> None:
    rows = sparse_rows(20_000)
    sae = train([DICTIONARY], TensorShards({"x": rows}), config(), tmp_path)["x"]
    assert explained_variance(sae, sparse_rows(1000, seed=5)) > 0.9
    loaded = TopKSAE.from_pretrained(tmp_path / "x")
    torch.testing.assert_close(loaded(rows[:50]), sae(rows[:50]), rtol=0, atol=0)
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(64), rtol=1e-5, atol=1e-5)
    history = json.loads((tmp_path / "history.json").read_text())
    assert history[-1]["step"] == 400
    assert history[-1]["dictionaries"]["x"]["loss"] < 0.1 < history[0]["dictionaries"]["x"]["loss"]
    assert (tmp_path / "x" / "sparsity.safetensors").exists()


KINDS: dict[str, dict[str, Any]] = {
    "kron": {"kron": (2, 4)},
    "hierarchical": {"objective": "hierarchical"},
    "budgets": {"objective": "hierarchical", "budgets": (1, 3), "budget_weights": (1.0, 3.0)},
    "multi_topk": {"objective": "multi_topk"},
    "matryoshka": {"objective": "matryoshka", "budgets": (16, 64)},
    "batch_topk": {"sparsifier": "batch_topk"},
    "batch_topk-matryoshka": {"sparsifier": "batch_topk", "objective": "matryoshka", "budgets": (16, 64)},
    "kron-product": {"kron": (4, 4), "kron_activation": "product"},
    "kron-listing": {"kron": (2, 4), "kron_mask_inactive": False},
    "kron-matryoshka": {"kron": (2, 4), "objective": "matryoshka", "budgets": (16, 32, 64)},
    "kron-hierarchical": {"kron": (4, 4), "objective": "hierarchical"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_saves_and_resumes(tmp_path: Path, kind: str) -> None:
    dictionary = DictionaryConfig(place="x", n_latents=64, k=3, **KINDS[kind])
    shards = TensorShards({"x": sparse_rows(20_000)})
    settings = config(tokens=20_000, checkpoint_every=60, keep_last=9)
    whole = train([dictionary], shards, settings, tmp_path / "whole")["x"]
    assert explained_variance(whole, sparse_rows(1000, seed=5)) > 0.6
    assert all(torch.isfinite(p).all() for p in whole.parameters())

    checkpoints = tmp_path / "parts" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000120", checkpoints / "step-00000120")
    resumed = train([dictionary], shards, settings, tmp_path / "parts")["x"]
    assert resumed.config.to_dict() | {"metadata": 0} == whole.config.to_dict() | {"metadata": 0}
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    loaded = TopKSAE.from_pretrained(tmp_path / "parts" / "x")
    assert type(loaded) is type(whole)
    rows = sparse_rows(50, seed=6)
    torch.testing.assert_close(loaded(rows), whole(rows), rtol=0, atol=0)


def test_one_hierarchical_dictionary_serves_smaller_budgets_better(tmp_path: Path) -> None:
    rows, held_out = sparse_rows(20_000), sparse_rows(1000, seed=5)
    kinds = [DictionaryConfig(place="x", n_latents=64, k=6, objective=o) for o in ("reconstruction", "hierarchical")]
    plain, hierarchical = train(kinds, TensorShards({"x": rows}), config(), tmp_path).values()
    curve = ev_curve(hierarchical, held_out, range(1, 7))
    assert all(later > earlier - 1e-3 for earlier, later in itertools.pairwise(curve.values()))
    for k in (1, 2, 3):
        errors = [((sae(held_out, k) - held_out).square().sum()).item() for sae in (plain, hierarchical)]
        assert errors[1] < errors[0]


def test_transcoder_learns_another_place(tmp_path: Path) -> None:
    rows = sparse_rows(20_000)
    matrix = torch.randn(24, 30, generator=torch.Generator().manual_seed(3))
    shards = TensorShards({"x": rows, "y": rows @ matrix})
    dictionary = DictionaryConfig(place="x", target="y", n_latents=64, k=3)
    sae = train([dictionary], shards, config(), tmp_path)["x-to-y"]
    held_out = sparse_rows(1000, seed=5)
    assert explained_variance(sae, held_out, held_out @ matrix) > 0.85
    assert (sae.config.d_in, sae.config.d_out, sae.config.transcoder) == (24, 30, True)


def test_several_dictionaries_in_one_pass_equal_each_alone(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(3000), "y": sparse_rows(3000, d=10)})
    dictionaries = [
        DictionaryConfig(place="x", n_latents=32, k=2),
        DictionaryConfig(place="x", n_latents=48, k=3, seed=1),
        DictionaryConfig(place="y", n_latents=16, k=2),
    ]
    short = config(tokens=3000)
    together = train(dictionaries, shards, short, tmp_path / "together")
    assert list(together) == ["x-n32-k2-s0", "x-n48-k3-s1", "y"]
    for i, name in enumerate(together):
        alone = train([dictionaries[i]], shards, short, tmp_path / f"alone-{i}")
        for key, value in next(iter(alone.values())).state_dict().items():
            torch.testing.assert_close(together[name].state_dict()[key], value, rtol=0, atol=0)


def test_aux_k_revives_dead_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sparse_rows(20_000)
    begin = Learner.begin

    def half_asleep(*arguments: object) -> Learner:
        """Every other latent answers a hundredth as strongly as it should, so that it is never among the k largest."""
        learner: Learner = begin(*arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            learner.weights.encoder[::2] *= 0.01
        return learner

    monkeypatch.setattr(Learner, "begin", half_asleep)
    dead = {}
    for alpha in (0.0, 1 / 32):
        settings = config(tokens=10_000, learning_rate=2e-3, alpha=alpha, dead_after=1000)
        sae = train([DICTIONARY], TensorShards({"x": rows}), settings, tmp_path / str(alpha))["x"]
        with torch.no_grad():
            latents = sae.encode_sparse(rows)
        dead[alpha] = 64 - len(latents.indices[latents.values > 0].unique())
    assert dead[0.0] > 20
    assert dead[1 / 32] < 0.5 * dead[0.0]


@pytest.mark.parametrize("precision", ["screened", "bfloat16"])
def test_reduced_precision_learns_as_well(tmp_path: Path, precision: str) -> None:
    rows = sparse_rows(20_000)
    sae = train([DICTIONARY], TensorShards({"x": rows}), config(precision=precision), tmp_path)["x"]
    assert explained_variance(sae, sparse_rows(1000, seed=5)) > 0.85


def test_decoder_norms_are_free_where_asked_for(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(2000)})
    sae = train([DICTIONARY], shards, config(tokens=2000, unit_norm_decoder=False), tmp_path)["x"]
    assert (sae.decoder.norm(dim=-1) - 1).abs().max() > 1e-3


def test_resumed_run_equals_an_uninterrupted_one_at_every_step(tmp_path: Path) -> None:
    rows = sparse_rows(730)
    settings = config(tokens=1200, checkpoint_every=1, keep_last=50)

    def shards() -> TensorShards:
        return TensorShards({"x": rows}, shard_rows=170)

    whole = train([DICTIONARY], shards(), settings, tmp_path / "whole")["x"].state_dict()
    for step in (1, 5, 11):
        out = tmp_path / f"from-{step}"
        saved = checkpoint.load(tmp_path / "whole" / "checkpoints")  # a run that stopped after `step`
        for later in range(step + 1, 13):
            assert (tmp_path / "whole" / "checkpoints" / f"step-{later:08d}").exists()
        out.mkdir()
        (out / "checkpoints").mkdir()
        source = tmp_path / "whole" / "checkpoints" / f"step-{step:08d}"
        target = out / "checkpoints" / source.name
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        resumed = train([DICTIONARY], shards(), settings, out)["x"].state_dict()
        assert saved.step == 12
        for key, value in whole.items():
            torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


def test_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TensorShards({"x": sparse_rows(600)})
    first = train([DICTIONARY], shards, config(tokens=600), tmp_path)["x"]

    def refuse(*arguments: object) -> None:
        raise AssertionError("a finished run trained again")

    monkeypatch.setattr(Learner, "step", refuse)
    again = train([DICTIONARY], shards, config(tokens=600), tmp_path)["x"]
    torch.testing.assert_close(again.encoder, first.encoder, rtol=0, atol=0)


def test_what_was_measured_of_a_dictionary_stays_beside_it_when_its_run_is_started_again(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(600)})
    train([DICTIONARY], shards, config(tokens=600), tmp_path)
    (tmp_path / "x" / "evaluation.json").write_text("{}")
    train([DICTIONARY], shards, config(tokens=600), tmp_path)
    assert (tmp_path / "x" / "evaluation.json").read_text() == "{}"


class _Notes(GeneralTracker):
    """A tracker that remembers what it is told."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert "run" in values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.rows.append((step, values))


def test_trackers_are_told_and_unknown_ones_are_named(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(600)})
    notes = _Notes()
    accelerator = Accelerator(cpu=True, log_with=[notes])
    train([DICTIONARY], shards, config(tokens=2000), tmp_path / "a", accelerator=accelerator)
    assert [step for step, _ in notes.rows] == [10, 20]
    assert {"learning_rate", "x/loss", "x/l0", "x/dead_fraction"} <= notes.rows[0][1].keys()
    with pytest.raises(TrimtabError, match="report_to='nosuch'"):
        train([DICTIONARY], shards, config(report_to=("nosuch",)), tmp_path / "b")


def test_sizes_beyond_the_memory_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    huge = DictionaryConfig(place="x", n_latents=10**10, k=3)
    with pytest.raises(TrimtabError, match=r"n_latents=10000000000 needs .* GiB"):
        train([huge], TensorShards({"x": sparse_rows(600)}), config(), tmp_path)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(600)})
    train([DICTIONARY], shards, config(tokens=600), tmp_path)
    with pytest.raises(TrimtabError, match=r"learning_rate.*0\.02"):
        train([DICTIONARY], shards, config(tokens=600, learning_rate=2e-3), tmp_path)
    with pytest.raises(TrimtabError, match="sha256"):
        train([DICTIONARY], TensorShards({"x": sparse_rows(600, seed=1)}), config(tokens=600), tmp_path)
    with pytest.raises(TrimtabError, match="n_latents"):
        train([DictionaryConfig(place="x", n_latents=65, k=3)], shards, config(tokens=600), tmp_path)


def test_damaged_checkpoint_is_refused_or_stepped_over(tmp_path: Path) -> None:
    shards = TensorShards({"x": sparse_rows(600)})
    settings = config(tokens=1000, checkpoint_every=5)
    whole = train([DICTIONARY], shards, settings, tmp_path)["x"]
    tensors = tmp_path / "checkpoints" / "step-00000010" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-7] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(TrimtabError, match=r"tensors\.safetensors"):
        train([DICTIONARY], shards, settings, tmp_path)
    with pytest.warns(UserWarning, match="step-00000005"):
        again = train([DICTIONARY], shards, settings, tmp_path, allow_previous=True)["x"]
    torch.testing.assert_close(again.encoder, whole.encoder, rtol=0, atol=0)


class _Poisoned(TensorShards):
    """Turns to NaN at shard 1."""

    def shard(self, index: int) -> dict[str, Tensor]:
        return {place: rows * (torch.nan if index else 1.0) for place, rows in super().shard(index).items()}


def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    shards = _Poisoned({"x": sparse_rows(1000)}, shard_rows=500)
    with pytest.raises(TrimtabError, match=r"step 2 of dictionary 'x': loss nan"):
        train([DICTIONARY], shards, config(tokens=1000, checkpoint_every=1), tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints")
    assert state.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in state.tree["dictionaries"]["x"]["weights"].values())


def test_bad_input_is_named(tmp_path: Path) -> None:
    shards = TensorShards({"resid.1": sparse_rows(600)})
    with pytest.raises(TrimtabError, match=r"place='resid\.2'.*resid\.1"):
        train([DictionaryConfig(place="resid.2", n_latents=8, k=2)], shards, config(), tmp_path)
    with pytest.raises(TrimtabError, match=r"dictionaries=\[\]"):
        train([], shards, config(), tmp_path)
    with pytest.raises(TrimtabError, match="do not vary"):
        train([DICTIONARY], TensorShards({"x": torch.ones(500, 4)}), config(), tmp_path)
    with pytest.raises(TrimtabError, match="twice"):
        dictionary_names([DICTIONARY, DICTIONARY], ["x"])


RUN = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_trainer import sparse_rows
from trimtab.sae import DictionaryConfig, TensorShards, TrainingConfig, train
class Slow(TensorShards):
    def shard(self, index):
        time.sleep(0.05)
        return super().shard(index)
shards = Slow({{"x": sparse_rows(900)}}, shard_rows=130)
settings = TrainingConfig(tokens=9000, batch_size=60, learning_rate=4e-3, dead_after=500, checkpoint_every=7)
print("ready", flush=True)
train([DictionaryConfig(place="x", n_latents=64, k=3)], shards, settings, sys.argv[1])
"""


def start(out: Path) -> subprocess.Popen[str]:
    """The run above in a process of its own, once it is about to train."""
    command = [sys.executable, "-c", RUN.format(tests=str(Path(__file__).parent)), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def weights_after_kills(out: Path, kills: int, seed: int) -> dict[str, Tensor]:
    """The finished dictionary of a run that was killed `kills` times at random moments and started again."""
    chance = random.Random(seed)
    for _ in range(kills):
        process = start(out)
        time.sleep(chance.uniform(0.0, 1.2))
        process.kill()
        process.communicate()
    process = start(out)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return load_file(out / "x" / "sae_weights.safetensors")


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_gives_bit_equal_weights(tmp_path: Path, kills: int) -> None:
    whole = weights_after_kills(tmp_path / "whole", 0, 0)
    killed = weights_after_kills(tmp_path / "killed", kills, seed=kills)
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, rtol=0, atol=0)


def test_interrupt_writes_a_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "stopped")
    while checkpoint.latest(tmp_path / "stopped" / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    stopped = checkpoint.load(tmp_path / "stopped" / "checkpoints").step
    assert 7 <= stopped < 150
    whole = weights_after_kills(tmp_path / "whole", 0, 0)
    resumed = weights_after_kills(tmp_path / "stopped", 0, 0)
    torch.testing.assert_close(resumed["W_enc"], whole["W_enc"], rtol=0, atol=0)
