"""The real models and texts as the set-up makes them: whole, finite, sane, and found again at once."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.gallery.testbeds import real_models

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def shakespeare() -> str:
    try:
        return real_models.shakespeare_text().read_text(encoding="utf-8")
    except real_models.RealModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reviews() -> list[list[str]]:
    try:
        lines = real_models.movie_reviews().read_text(encoding="utf-8").splitlines()
    except real_models.RealModelUnavailable as error:
        pytest.skip(str(error))
    return [line.split("\t") for line in lines]


def perplexity(model: Any, tokenizer: Any, text: str, *, windows: int, length: int) -> float:
    """exp of the mean loss a token, each window opened by <bos>."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: windows * length]
    batch = torch.tensor(ids).view(windows, length)
    batch = torch.cat([torch.full((windows, 1), tokenizer.bos_token_id), batch], dim=1)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss
    return math.exp(loss.item())


# -- the cache -------------------------------------------------------------------------------------


def test_second_start_is_instant_and_gives_the_same_folder(gemma: Path) -> None:
    start = time.perf_counter()
    again = real_models.gemma3_270m()
    assert time.perf_counter() - start < 1.0
    assert again == gemma


def test_marker_holds_the_checksums_of_every_file(minilm: Path) -> None:
    files = json.loads((minilm / "trimtab.json").read_text(encoding="utf-8"))["files"]
    assert files.keys() == {path.name for path in minilm.iterdir()} - {"trimtab.json"}
    for name, noted in files.items():
        assert noted["sha256"] == hashlib.sha256((minilm / name).read_bytes()).hexdigest()


# -- Gemma 3 270M ----------------------------------------------------------------------------------


def test_gemma_is_an_ordinary_float32_model(gemma: Path, gemma_model: Any) -> None:
    config = json.loads((gemma / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert gemma_model.num_parameters() == 268_098_176
    assert {p.dtype for p in gemma_model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in gemma_model.parameters())


def test_gemma_reads_english_well(gemma_model: Any, gemma_tokenizer: Any, shakespeare: str) -> None:
    hamlet = shakespeare[shakespeare.index("HAMLET, PRINCE OF DENMARK") :]
    measured = perplexity(gemma_model, gemma_tokenizer, hamlet, windows=4, length=256)
    assert 5 < measured < 80


def test_gemma_logits_are_finite_and_know_the_capital_of_france(gemma_model: Any, gemma_tokenizer: Any) -> None:
    inputs = gemma_tokenizer("The capital of Germany is Berlin. The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = gemma_model(**inputs).logits
    assert torch.isfinite(logits).all()
    assert gemma_tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_gemma_generates_words(gemma_model: Any, gemma_tokenizer: Any) -> None:
    inputs = gemma_tokenizer("Once upon a time, there was a", return_tensors="pt")
    out = gemma_model.generate(**inputs, max_new_tokens=12, do_sample=False)
    words = gemma_tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).split()
    assert len(words) >= 6
    assert len(set(words)) >= 4


def test_gemma_tokenizer_opens_with_bos_and_knows_its_special_tokens(gemma_tokenizer: Any) -> None:
    assert gemma_tokenizer("Hello world").input_ids == [2, 9259, 1902]
    text = "<start_of_turn>user\nhi<end_of_turn>\n<eos><pad>"
    ids = gemma_tokenizer(text).input_ids
    special = gemma_tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    names = gemma_tokenizer.convert_ids_to_tokens(ids)
    marked = {name for name, is_special in zip(names, special, strict=True) if is_special}
    assert marked == {"<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"}
    assert gemma_tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\n"


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), min_size=1))
def test_gemma_tokenizer_round_trips(gemma_tokenizer: Any, text: str) -> None:
    ids = gemma_tokenizer(text, add_special_tokens=False).input_ids
    assert gemma_tokenizer.decode(ids) == text


@pytest.mark.slow
def test_conversion_from_the_packages_gives_the_same_bytes(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The conversion itself compares the logits of the GGUF-loaded and the saved model bit by bit.
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    anew = real_models.gemma3_270m()
    assert anew == tmp_path / "gemma3-270m"
    assert json.loads((anew / "trimtab.json").read_text())["files"].keys() == {
        path.name for path in gemma.iterdir()
    } - {"trimtab.json"}
    assert (anew / "model.safetensors").read_bytes() == (gemma / "model.safetensors").read_bytes()


# -- MiniLM-L6 -------------------------------------------------------------------------------------


def test_minilm_puts_like_sentences_near_each_other(minilm_model: Any, minilm_tokenizer: Any) -> None:
    sentences = ["A man is eating food.", "A man eats a meal.", "The stock market fell."]
    inputs = minilm_tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = minilm_model(**inputs).last_hidden_state
    assert torch.isfinite(states).all()
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    likeness = means @ means.T
    assert likeness[0, 1] > 0.8
    assert likeness[0, 2] < 0.3


def test_minilm_tokenizer_frames_a_text(minilm_tokenizer: Any) -> None:
    assert minilm_tokenizer.convert_ids_to_tokens(minilm_tokenizer("Hello").input_ids) == [
        "[CLS]",
        "hello",
        "[SEP]",
    ]


# -- texts -----------------------------------------------------------------------------------------


def test_shakespeare_is_his_works_and_nothing_else(shakespeare: str) -> None:
    assert 4_800_000 < len(shakespeare) < 5_200_000
    assert shakespeare.isascii()
    for line in ("To be, or not to be", "Shall I compare thee to a summer's day?", "Friends, Romans, countrymen"):
        assert line in shakespeare
    for word in ("gutenberg", "etext prepared", "copyright"):
        assert word not in shakespeare.lower()


def test_movie_reviews_have_a_mean_and_a_text_each(reviews: list[list[str]]) -> None:
    assert len(reviews) == 10_605
    assert {len(row) for row in reviews} == {2}
    means = [float(mean) for mean, _ in reviews]
    assert -4 <= min(means) < -3 < 3 < max(means) <= 4
    assert 0.4 < sum(mean > 0 for mean in means) / len(means) < 0.6
    assert not any("&amp;" in text or "  " in text for _, text in reviews)
