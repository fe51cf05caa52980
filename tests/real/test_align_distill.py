"""The long benchmarks' parts on Gemma itself, two steps each: they run, move what they should and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gemma_align, gemma_distill
from benchmarks.continuations import given

from trimtab.gallery.testbeds.real_models import RealModelUnavailable
from trimtab.gallery.testbeds.reviews import preference_split, rated_reviews

pytestmark = [
    pytest.mark.real,
    # TRL asks models and arguments by names that transformers has since renamed.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

ALIGN = gemma_align.Setting(steps=2, pairs_per_step=2, pairs=2, samples=2, new_tokens=4, texts=2, judge_texts=64)
START = gemma_distill.WarmStart(layers=3, steps=1, texts_per_step=2)
DISTILL = gemma_distill.Setting(steps=2, rollouts=2, new_tokens=4, prompts=2, texts=2, warm_start=START)


@pytest.fixture(autouse=True)
def _at_hand(gemma: Path) -> None:
    """Without the reviews' package the test skips, as it does without Gemma's."""
    try:
        rated_reviews()
    except RealModelUnavailable as error:
        pytest.skip(str(error))


def test_reviews_give_the_pairs_that_the_benchmarks_count_on() -> None:
    split = preference_split(rated_reviews())
    assert (len(split.train), len(split.held_out)) == (451, 168)
    assert len(split.others) == 10_605 - 2 * (451 + 168)
    chosen, rejected = (
        sum(len(getattr(pair, kind).split()) for pair in split.train) for kind in ("chosen", "rejected")
    )
    assert abs(chosen / rejected - 1) < 0.02


def test_the_first_layers_of_gemma_give_its_own_states(gemma_model: Any, gemma_tokenizer: Any) -> None:
    student = gemma_distill.first_layers(gemma_model, 3).eval()
    inputs = gemma_tokenizer("The small flap on the rudder", return_tensors="pt")
    with torch.no_grad():
        state = gemma_model(**inputs, output_hidden_states=True).hidden_states[3]
        lens = gemma_model.lm_head(gemma_model.model.norm(state))
        torch.testing.assert_close(student(**inputs).logits, lens)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["text", "conversation"])
def test_pairs_are_tokenised_as_prompt_answer_and_stop(chat: bool, tmp_path: Path) -> None:
    host = gemma_align.trainer(ALIGN, 1.0, None, chat, str(tmp_path))
    words, pair, row = gemma_align.tokenizer(chat), gemma_align.split().held_out[0], host.eval_dataset[0]
    whole = words.decode(row["prompt_ids"] + row["chosen_ids"])
    assert row["prompt_ids"][0] == words.bos_token_id
    assert row["prompt_ids"].count(words.bos_token_id) == 1
    assert whole.endswith(pair.chosen + ("<end_of_turn>\n" if chat else "<eos>"))
    assert pair.opening in words.decode(row["chosen_ids"] if chat else row["prompt_ids"])


@pytest.mark.slow
def test_two_steps_of_alignment() -> None:
    by_name = {arm.name: arm for arm in gemma_align.arms(ALIGN)}
    figures = dict(by_name["fixed, beta 1"].run())
    assert all(math.isfinite(value) for value, _ in figures.values())
    assert 0 < figures["positive"][0] < 1
    assert figures["KL to the initial model"][0] > 0
    # tau = 1 at two steps: the second step already has another reference, and so other weights come of it.
    moved = dict(by_name["hard, beta 1"].run())
    assert moved["margin"] != figures["margin"]


@pytest.mark.slow
def test_before_training_nothing_diverges() -> None:
    figures = gemma_align._untrained(replace(ALIGN, samples=1))
    assert figures["KL to the initial model"][0] == 0.0
    assert figures["margin"][0] == 0.0


@pytest.mark.slow
def test_two_steps_of_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_distill, "cache_dir", lambda: tmp_path)
    by_name = {arm.name: arm for arm in gemma_distill.arms(DISTILL)}
    before = dict(by_name["before training"].run())
    assert [folder.name for folder in (tmp_path / "benchmarks").iterdir()] == [
        "gemma-student-layers3-steps1-texts_per_step2-learning_rate0.0005-seed0"
    ]
    found = {name: dict(by_name[name].run()) for name in ("vanilla", "SFT warm-up")}
    for figures in (before, *found.values()):
        assert all(math.isfinite(value) for value, _ in figures.values())
        assert figures["reverse KL, the end"][0] > 0
    assert found["vanilla"].keys() == found["SFT warm-up"].keys() >= before.keys()
    assert found["vanilla"]["reverse KL, the end"] != before["reverse KL, the end"]


@pytest.mark.slow
def test_a_step_of_trust_region_blending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_distill, "cache_dir", lambda: tmp_path)
    by_name = {arm.name: arm for arm in gemma_distill.arms(replace(DISTILL, steps=1))}
    figures = dict(by_name["TRB 0.1"].run())
    assert figures["log q of rollouts, first quarter"][0] < 0
    assert all(math.isfinite(value) for value, _ in figures.values())


@pytest.mark.slow
def test_only_layers_and_norm_of_the_student_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma_distill, "cache_dir", lambda: tmp_path)
    host = gemma_distill.trainer(DISTILL, None, str(tmp_path / "out"))
    before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    host.train()
    changed = {name for name, tensor in host.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & changed
    assert {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= changed
    teacher = gemma_distill.teacher()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher.lm_head.weight, host.model.lm_head.weight)
    prompts, answers = host.recorded
    assert len(prompts) == len(answers) == DISTILL.quarter * DISTILL.rollouts
    assert given(prompts, answers).answer_length <= DISTILL.new_tokens
