"""What the long benchmarks stand on: arms that are run once, exact divergences along texts, the judge, the tables."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gemma_align, gemma_distill
from benchmarks.continuations import Continuations, answer_log_probs, divergences, given, log_probs, sample, texts
from benchmarks.measure import read_rows
from benchmarks.real_arms import Arm, Figure, run_arms

ROOT = Path(__file__).parent.parent


# -- arms ------------------------------------------------------------------------------------------


def arms(calls: list[str], **values: float) -> list[Arm]:
    def run(name: str) -> Mapping[str, Figure]:
        calls.append(name)
        return {"reward": (values[name], "1"), f"only {name}": (0.5, "s")}

    return [
        Arm("base", lambda: run("base")),
        Arm("ours", lambda: run("ours"), "base"),
        Arm("last", lambda: run("last")),
    ]


def test_an_arm_is_run_once_and_beside_its_peer(tmp_path: Path) -> None:
    calls: list[str] = []
    run_arms("runs", arms(calls, base=2.0, ours=3.0), ["ours"], directory=tmp_path)
    assert calls == ["base", "ours"]
    run_arms("runs", arms(calls, base=7.0, ours=7.0, last=1.0), ["ours", "last"], directory=tmp_path)
    assert calls == ["base", "ours", "last"]
    rows = {row["name"]: row for row in read_rows("runs", directory=tmp_path)}
    assert list(rows)[:2] == ["base: reward", "base: only base"]
    assert (rows["base: reward"]["ours"], rows["base: reward"]["peer"]) == (2.0, None)
    assert [rows["ours: reward"][key] for key in ("ours", "peer", "peer_version", "ratio")] == [3.0, 2.0, "base", 1.5]
    assert (rows["ours: only ours"]["peer"], rows["ours: only ours"]["peer_version"]) == (None, None)
    assert rows["last: reward"].keys() >= {"machine", "versions", "date"}


def test_an_arm_that_fails_leaves_the_rows_of_those_before_it(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyError):
        run_arms("runs", arms(calls, base=2.0), ["base", "ours"], directory=tmp_path)
    assert [row["name"] for row in read_rows("runs", directory=tmp_path)] == ["base: reward", "base: only base"]


def test_a_trial_writes_nothing_and_knows_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.json").write_text("[]")
    run_arms("runs", arms([], base=2.0, ours=3.0), ["ours"], directory=None)
    assert read_rows("runs", directory=tmp_path) == []
    assert "ours: reward" in capsys.readouterr().out


@pytest.mark.parametrize("module", [gemma_align, gemma_distill])
def test_every_peer_is_an_arm_before_its_own(module: Any) -> None:
    listed = module.arms(module.Setting())
    names = [arm.name for arm in listed]
    assert len(set(names)) == len(names)
    assert not [name for name in names if ": " in name]
    for index, arm in enumerate(listed):
        assert arm.peer is None or arm.peer in names[:index]


def test_the_table_of_arms_has_a_line_an_arm(tmp_path: Path) -> None:
    run_arms("gemma_align", arms([], base=2.0, ours=3.0, last=1.0), ["base", "ours", "last"], directory=tmp_path)
    made = runpy.run_path(str(ROOT / "docs" / "results" / "make.py"))
    made["_arms"].__globals__["RESULTS"] = tmp_path
    lines = made["_arms"]("gemma_align").splitlines()
    assert lines[0] == "| arm | reward | only base (s) | only ours (s) | only last (s) |"
    assert lines[3] == "| ours | 3 |  | 0.5 |  |"
    assert "one seed" in lines[-1]
    assert made["_arms"]("gemma_distill") == made["NOTHING"]


# -- continuations ---------------------------------------------------------------------------------


@pytest.fixture
def written(tiny_llama: Any) -> Continuations:
    return sample(tiny_llama, [[1, 5, 6], [1, 7], [1, 8, 9, 10]], [2, 3], new_tokens=12, seed=0)


def test_samples_are_masked_after_their_first_stop_and_leave_the_generator(tiny_llama: Any) -> None:
    before = torch.random.get_rng_state()
    # Half of all tokens stop, so that rows end at different places.
    stops = list(range(2, tiny_llama.config.vocab_size, 8))
    found = sample(tiny_llama, [[1, 5, 6], [1, 7]] * 8, stops, new_tokens=12, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.ids.shape == found.mask.shape == (16, 15)
    lengths = found.answer_mask.sum(-1)
    assert len(set(lengths.tolist())) > 2
    for answer, length in zip(found.answers.tolist(), lengths.tolist(), strict=True):
        assert not set(answer[: length - 1]) & set(stops)
        assert length == 12 or answer[length - 1] in stops
    assert torch.equal(found.ids, sample(tiny_llama, [[1, 5, 6], [1, 7]] * 8, stops, new_tokens=12, seed=0).ids)
    assert not torch.equal(found.ids, sample(tiny_llama, [[1, 5, 6], [1, 7]] * 8, stops, new_tokens=12, seed=1).ids)


def test_log_probabilities_of_answers_are_those_without_padding(tiny_llama: Any) -> None:
    prompts, answers = [[1, 5, 6], [1, 7]], [[8, 9, 2], [10, 2]]
    padded = answer_log_probs(tiny_llama, given(prompts, answers))
    for prompt, answer, value in zip(prompts, answers, padded, strict=True):
        log_p = tiny_llama(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        alone = sum(log_p[len(prompt) + index - 1, token] for index, token in enumerate(answer))
        torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-5)


def test_divergences_are_sums_along_the_answers(tiny_llama: Any, written: Continuations) -> None:
    other = type(tiny_llama)(tiny_llama.config).eval()
    forward, backward = divergences(tiny_llama, other, written)
    with torch.no_grad():
        log_p, log_q = log_probs(tiny_llama, written), log_probs(other, written)
    by_hand = [
        sum(((p.exp() * (p - q)).sum() for p, q, kept in zip(*rows, strict=True) if kept), torch.zeros(()))
        for rows in zip(log_p, log_q, written.answer_mask, strict=True)
    ]
    torch.testing.assert_close(forward, torch.stack(by_hand), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backward, divergences(other, tiny_llama, written)[0], rtol=1e-4, atol=1e-5)
    assert bool((forward > 0).all())
    none, _ = divergences(tiny_llama, tiny_llama, written)
    assert torch.equal(none, torch.zeros(3))


def test_texts_are_the_first_lines_of_the_answers() -> None:
    class Words:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return " ".join("\n" if index == 9 else f"w{index}" for index in ids.tolist())

    assert texts(given([[1, 2], [1]], [[5, 6, 2], [7, 9, 8]]), Words()) == ["w5 w6 w2", "w7 "]


# -- models ----------------------------------------------------------------------------------------


def test_the_judge_separates_what_a_plane_separates() -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    liked = rows[:, 0] - rows[:, 1] > 0.1
    judge = gemma_align.fitted(rows, liked, ridge=1e-4)
    found = torch.sigmoid(rows @ judge.weight + judge.bias)
    assert float(((found > 0.5) == liked).float().mean()) > 0.98
    # At the minimum the gradient is 0: mean (p - y) x + ridge w.
    gradient = ((found - liked.float())[:, None] * rows).mean(0) + 1e-4 * judge.weight
    assert float(gradient.abs().max()) < 1e-4


def test_first_layers_are_the_models_own() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = Gemma3ForCausalLM(config).eval()
    student = gemma_distill.first_layers(model, 2).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[2]
        lens = model.lm_head(model.model.norm(state))
        torch.testing.assert_close(student(ids).logits, lens)
        assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()
        next(student.parameters()).zero_()
        assert bool(next(model.parameters()).any())
    assert model.config.num_hidden_layers == 4
