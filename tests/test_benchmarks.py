"""What the benchmarks stand on: times, targets, rows and files. Nothing here measures speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from benchmarks import __main__ as all_benchmarks
from benchmarks import (
    gpu,
    gpu_trust_region,
    kernels,
    measure,
    reference_update,
    sae_methods,
    sae_rates,
    sae_training,
    tr_align_betas,
    trb_rollout,
    trust_region,
)
from benchmarks.measure import Row, Target, Times
from benchmarks.sae_arms import Setting
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationTrainer

from trimtab.core.simplex import trust_region_blend
from trimtab.distill import TRBTrainer
from trimtab.distill.eos import StopIds
from trimtab.distill.processor import TrustRegionBlend
from trimtab.gallery.experiments.tr_align import TUNED
from trimtab.gallery.testbeds.micro import micro_model

ROW = Row(name="speed", unit="tokens/s", ours=300.0, peer=200.0, repeats=3, cpu_seconds=2.0, wall_seconds=1.0)


def test_functions_run_in_turns_after_one_unmeasured_call_each() -> None:
    calls: list[str] = []
    times = measure.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: (len(taken.wall), len(taken.cpu)) for name, taken in times.items()} == {"a": (2, 2), "b": (2, 2)}


def test_times_give_medians() -> None:
    times = Times([3.0, 1.0, 100.0], [1.0, 2.0, 4.0])
    assert (times.wall_median, times.cpu_median) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("ratio", ">=", 1.5), True),
        (Target("ratio", ">=", 1.51), False),
        (Target("ratio", "<=", 1.4), False),
        (Target("ours", "<=", 300), True),
        (Target("difference", ">=", 100), True),
        (Target("difference", ">=", 101), False),
        (Target("distance", "<=", 100), True),
    ],
)
def test_a_target_is_met_at_its_bound(target: Target, met: bool) -> None:
    assert replace(ROW, target=target).met is met


def test_distance_has_no_sign() -> None:
    row = replace(ROW, ours=100.0, target=Target("distance", "<=", 99))
    assert (row.difference, row.distance, row.met) == (-100.0, 100.0, False)


def test_a_figure_without_a_peer_has_no_ratio_and_no_target_on_it() -> None:
    alone = replace(ROW, peer=None)
    assert (alone.ratio, alone.difference, alone.distance, alone.met) == (None, None, None, None)
    with pytest.raises(ValueError, match="'speed' has no ratio"):
        _ = replace(alone, target=Target("ratio", ">=", 1)).met


def test_rows_are_written_with_all_that_a_reader_needs(tmp_path: Path) -> None:
    rows = [replace(ROW, target=Target("ratio", ">=", 1.75), peer_version="peer 1.0"), replace(ROW, peer=None)]
    path = measure.write_rows("speeds", rows, directory=tmp_path)
    first, second = measure.read_rows("speeds", directory=tmp_path)
    assert json.loads(path.read_text()) == [first, second]
    assert (first["target"], first["met"], first["ratio"], first["peer_version"]) == (
        "ratio >= 1.75",
        False,
        1.5,
        "peer 1.0",
    )
    assert (second["target"], second["met"], second["ratio"], second["peer"]) == (None, None, None, None)
    asked = {"name", "ours", "peer", "peer_version", "ratio", "target", "met", "repeats", "seeds", "unit"}
    assert first.keys() >= asked | {"cpu_seconds", "wall_seconds", "machine", "date"}


def test_no_rows_where_none_were_written(tmp_path: Path) -> None:
    assert measure.read_rows("speeds", directory=tmp_path) == []


def test_shortfalls_name_what_misses_its_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [replace(ROW, name="fast", target=Target("ratio", ">=", 1)), replace(ROW, target=Target("ratio", ">=", 2))]
    measure.write_rows("speeds", rows, directory=tmp_path)
    monkeypatch.setattr(all_benchmarks, "read_rows", lambda script: measure.read_rows(script, directory=tmp_path))
    (line,) = all_benchmarks.shortfalls(["speeds", "never run"])
    assert "speeds: speed:" in line
    assert "ratio 1.5" in line
    assert "target ratio >= 2" in line
    assert all_benchmarks.shortfalls(["never run"]) == ["Every figure meets its target."]


def test_speeds_are_compared_over_the_rounds_that_both_trained_with_aux_k_at_work() -> None:
    setting = Setting(arm="any", rows="", learning_rate=1.0, batch_size=10, steps_per_round=2, rounds=5, dead_after=3)
    walls = {"trimtab": [9.0, 9, 2, 4, 3], "trimtab-screened": [9.0, 9, 1, 1, 1], "saelens": [1.0, 1, 8, 8, 8]}
    walls |= {"sparsify": [1.0, 1, 6, 6, 6], "saelens-sparse": [1.0, 1, 8]}
    outcomes = {
        name: sae_training.Outcome(replace(setting, rounds=len(wall)), Times(wall, wall), peak=2**20, version="v")
        for name, wall in walls.items()
    }
    rows = {row.name: row for row in sae_training.figures(outcomes)}
    dense, sparse = rows["tokens/s beside SAELens TopK"], rows["tokens/s beside SAELens TopK, sparse mode"]
    assert (dense.ours, dense.peer, dense.repeats, dense.wall_seconds) == (20 / 3, 20 / 8, 3, 33)
    assert (sparse.ours, sparse.peer, sparse.repeats, sparse.wall_seconds) == (20 / 2, 20 / 8, 1, 10)
    assert rows["peak memory beside SAELens"].ratio == 1


def test_sparsify_is_held_against_our_best_rate() -> None:
    setting = Setting(arm="any", rows="", learning_rate=1.0)
    rates = {"trimtab": sae_rates.ADAM_RATES, "saelens": sae_rates.ADAM_RATES, "sparsify": sae_rates.SIGN_RATES}
    outcomes = {
        (arm, rate): sae_training.Outcome(setting, Times([1.0], [1.0]), explained_variance=arm_number + index / 10)
        for arm_number, (arm, grid) in enumerate(rates.items())
        for index, rate in enumerate(grid)
    }
    rows = {row.name: row for row in sae_rates.rows_of(outcomes)}
    assert rows["both with Adam at 0.0032"].ours == 0.0
    assert rows["both with Adam at 0.0032"].peer == 1.0
    assert rows["ours at 0.0128, sparsify at 0.005"].ours == 0.2
    assert rows["ours at 0.0128, sparsify at 0.005"].peer == 2.0


def test_steps_of_whole_models_are_carried_on_from_few_blocks() -> None:
    assert trb_rollout.whole_step(5.0, 7.0, blocks=1) == 5.0
    assert trb_rollout.whole_step(5.0, 7.0, blocks=3) == 7.0
    assert trb_rollout.whole_step(5.0, 7.0, blocks=28) == 32.0


def test_what_is_timed_of_rollouts_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trb_rollout, "REPEATS", 1)
    student, teacher = trb_rollout.qwen(2, 16, 16, 40, 8), trb_rollout.qwen(1, 16, 16, 40, 8)
    trb_rollout.keep_blocks(student, 1)
    row = trb_rollout.rollout_row("tiny", student, teacher, StopIds((3,), (4, 3)))
    assert row.ours > 0
    assert row.peer is not None
    student_logits, teacher_logits = trust_region.logits(trb_rollout.ROWS, 40)
    teacher = trb_rollout.FixedLogits(teacher_logits)
    prompts = torch.ones(trb_rollout.ROWS, 1, dtype=torch.long)
    log_mu = TrustRegionBlend(teacher, 0.1)(prompts, student_logits)
    torch.testing.assert_close(log_mu, trust_region_blend(student_logits, teacher_logits, 0.1)[0])
    step = trb_rollout.decoding_step(student)
    assert step().shape == step().shape == (trb_rollout.ROWS, 1, 40)


def test_peak_memory_is_that_of_the_call() -> None:
    held: list[torch.Tensor] = []
    assert sae_methods.peak_bytes(lambda: torch.ones(1 << 24).sum()) > 60 * 2**20
    assert sae_methods.peak_bytes(lambda: held) < 30 * 2**20


def test_dense_products_are_the_same_products() -> None:
    for name, (ours, dense) in kernels.products(17, 12, 50, 3).items():
        mine, other = ours(), dense()
        if name.startswith("top_products"):  # unsorted
            mine, other = mine.sort().values, other.sort().values
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_timed_on_a_gpu_gives_the_same_losses_and_gradients() -> None:
    tensors = gpu.case(5, 7, 30, 4, "cpu")
    calls = gpu.losses(tensors, lambda function: function)
    for name in ("hierarchical", "topk"):
        for mine, plain in zip(calls[name](), calls[f"plain {name}"](), strict=True):
            torch.testing.assert_close(mine, plain)
        step = gpu.steps(tensors)[name]()
        # The steps' losses are sums over d in units of a variance of 1, the others means.
        torch.testing.assert_close(step.loss, 7 * calls[name]()[0])
        torch.testing.assert_close(step.d_values, 7 * calls[name]()[1])


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_is_timed_on_a_gpu_with_dead_latents_in_both() -> None:
    calls = gpu.training_steps(64, 8, 64, 4, "cpu")
    for call in calls.values():
        call()
        call()


@pytest.mark.parametrize("lacking", ["device", "triton"])
def test_without_a_gpu_the_benchmark_says_that_it_needs_one(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacking != "device")
    monkeypatch.setattr(gpu.kernels, "HAS_TRITON", lacking != "triton")
    with pytest.raises(SystemExit, match="needs a CUDA device and the package triton") as stopped:
        gpu.main()
    assert stopped.value.code != 0


def test_bisection_finds_the_blend_that_newton_finds() -> None:
    student, teacher = trust_region.logits(5, 200)
    log_mu, beta, _ = trust_region_blend(student, teacher, 0.1)
    other_mu, other = trust_region.bisect(student, teacher, 0.1, 25)
    torch.testing.assert_close(beta, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_mu, other_mu, atol=1e-3, rtol=0)


def test_our_arm_trains_in_rounds(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    path = str(tmp_path / "rows.safetensors")
    save_file({"train": rows[:192] / rows.std(), "held_out": rows[192:] / rows.std()}, path)
    setting = Setting(arm="trimtab", rows=path, learning_rate=1e-2, n_latents=32, k=4, batch_size=32, threads=1)
    setting = replace(setting, steps=6, steps_per_round=2, rounds=3, dead_after=2)
    outcome = sae_training.train_in_turns({"trimtab": setting})["trimtab"]
    assert len(outcome.rounds.wall) == len(outcome.rounds.cpu) == 3
    assert 0.2 < outcome.explained_variance < 1
    assert outcome.peak > 0


def test_reference_updates_are_measured_beside_steps() -> None:
    folder = micro_model("micro-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = reference_update.measure(AutoModelForCausalLM.from_pretrained(folder), tokenizer, 1)
    assert all(row.ours > 0 and row.peer > 0 for row in rows)
    *_, factors = rows
    assert factors.ours < factors.peer  # the adapter's bytes, and the whole model's


def test_what_is_timed_of_trust_regions_on_a_gpu_runs() -> None:
    for calls in (
        gpu_trust_region.solve_calls(2, 50, "cpu"),
        gpu_trust_region.rollout_calls(64, 32, "cpu"),
        gpu_trust_region.update_calls(1, 32, 64, "cpu"),
    ):
        for call in calls.values():
            call()


def test_trust_regions_on_a_gpu_fill_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"is_available": True, "synchronize": None, "get_device_name": "a device", "device_count": 1}
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, fact=fact: fact)
    calls = {"ours": lambda: sum(range(10_000)), "peer": lambda: sum(range(10_000))}
    for name in ("solve_calls", "rollout_calls", "update_calls"):
        monkeypatch.setattr(
            gpu_trust_region, name, create_autospec(getattr(gpu_trust_region, name), return_value=calls)
        )
    rows: list[Row] = []
    monkeypatch.setattr(gpu_trust_region, "write_rows", lambda _, found: rows.extend(found))
    gpu_trust_region.main()
    assert [row.name.split()[0] for row in rows] == ["solve", "rollout", "update"]
    assert all(row.ours > 0 and row.peer > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "Trust regions on a device" in printed
    assert "not checked, one device has no shards" in printed


def test_without_a_gpu_the_trust_regions_say_that_they_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_trust_region.main()


@pytest.mark.parametrize("trainer", [TRBTrainer, DistillationTrainer])
def test_steps_after_the_warm_up_are_those_of_both_trainers(trainer: type) -> None:
    student, teacher = (trb_rollout.qwen(1, 32, 64, 4096) for _ in range(2))
    before = [weight.detach().clone() for weight in student.parameters()]
    trb_rollout.training_step(trainer, student, teacher)()
    assert any(weight.grad is not None for weight in student.parameters())
    assert all(torch.equal(weight, old) for weight, old in zip(student.parameters(), before, strict=True))


def test_tuned_betas_are_compared_in_pairs_with_others() -> None:
    rows = {row.name: row for row in tr_align_betas.measure(range(5000, 5003), 20)}
    for loss, beta in TUNED:
        others = [other for other in tr_align_betas.BETAS[loss] if other != beta]
        assert len(others) == 4
        tuned = rows[f"{loss}, beta {beta:g}: reward gained"]
        assert f"{loss}, beta {beta:g}: difference to the tuned beta" not in rows
        for other in others:
            gained = rows[f"{loss}, beta {other:g}: reward gained"]
            difference = rows[f"{loss}, beta {other:g}: difference to the tuned beta"]
            assert difference.ours == pytest.approx(gained.ours - tuned.ours, abs=1e-6)
    assert {row.seeds for row in rows.values()} == {3}


def test_the_committed_sweep_finds_the_tuned_betas_best() -> None:
    rows = measure.read_rows("tr_align_betas")
    differences = [row for row in rows if row["name"].endswith("difference to the tuned beta")]
    assert len(differences) == 4 * len(TUNED)
    assert all(row["ours"] < 0 for row in differences)
