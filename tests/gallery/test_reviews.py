"""Preference pairs of reviews: what pairs share, that parts share nothing, that lengths match as well as they can."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds import reviews
from trimtab.gallery.testbeds.reviews import CHAT_TEMPLATE, PREFIX, PreferencePair, Review, preference_split

WORDS = ("fine", "dull", "long", "plot", "actors", "songs", "again", "never")
EXTREMES = (("superb", 3.0), ("dreadful", -3.0))
OPENINGS = ("The film", "It is", "A story")


@st.composite
def rated(draw: st.DrawFn) -> list[Review]:
    """Reviews of three openings."""
    rest = st.lists(st.sampled_from(WORDS), min_size=0, max_size=6).map(lambda words: "".join(f" {w}" for w in words))
    texts = draw(st.lists(st.tuples(st.sampled_from(OPENINGS), rest), min_size=1, max_size=30))
    return [Review(opening + rest, draw(st.floats(-4, 4))) for opening, rest in texts]


@given(found=rated(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_parts_share_no_review_and_pairs_are_what_they_say(found: list[Review], seed: int) -> None:
    # Two openings with a pair each, of words that no drawn review has.
    found = [*found, *(Review(f"{opening} {word}", mood) for opening in OPENINGS[:2] for word, mood in EXTREMES)]
    found = list({review.text: review for review in found}.values())
    split = preference_split(found, max_words=6, seed=seed)
    sentiment = {review.text: review.sentiment for review in found}
    pairs = [*split.train, *split.held_out]
    assert split.train
    assert split.held_out
    assert not {pair.opening for pair in split.train} & {pair.opening for pair in split.held_out}
    used = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert len(set(used)) == len(used)
    assert {review.text for review in split.others} == {review.text for review in found} - set(used)
    for pair in pairs:
        assert sentiment[pair.chosen] >= 1 > -1 >= sentiment[pair.rejected]
        for text in (pair.chosen, pair.rejected):
            assert text.startswith(pair.opening + " ")
            assert len(text.split()) <= 6


@given(
    first=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    second=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_lengths_differ_as_little_as_any_matching_allows(first: list[int], second: list[int]) -> None:
    texts = [[" ".join(["word"] * length) for length in lengths] for lengths in (first, second)]
    matched = reviews._matched(*texts)
    assert len(matched) == min(len(first), len(second))
    longer, shorter = sorted((first, second), key=len, reverse=True)
    least = min(
        sum(abs(a - b) for a, b in zip(chosen, shorter, strict=True))
        for chosen in itertools.permutations(longer, len(shorter))
    )
    assert sum(abs(len(a.split()) - len(b.split())) for a, b in matched) == least


def test_an_opening_gives_as_many_pairs_as_its_rarer_kind_and_leaves_the_lukewarm() -> None:
    found = [
        Review("The film sings", 2.0),
        Review("The film shines", 1.0),
        Review("The film bores", -1.0),
        Review("It is fine", 3.0),
        Review("It is dire", -3.0),
        Review("It is so-so", 0.9),
        Review("A story", 4.0),
    ]
    split = preference_split(found)
    (lesser,) = [pair for pair in (*split.train, *split.held_out) if pair.opening == "The film"]
    (other,) = [pair for pair in (*split.train, *split.held_out) if pair.opening == "It is"]
    assert lesser.rejected == "The film bores"
    assert other == PreferencePair("It is", "It is fine", "It is dire")
    assert len(split.others) == 3


def test_a_seed_gives_one_split() -> None:
    found = [Review(f"{opening} {word}", sign * 2.0) for opening in OPENINGS for word in WORDS for sign in (1, -1)]
    found = [Review(f"{review.text} {index}", review.sentiment) for index, review in enumerate(found)]
    assert preference_split(found, seed=1) == preference_split(found, seed=1)
    assert preference_split(found, seed=1).train != preference_split(found, seed=2).train


def test_a_text_pair_is_prompt_and_rest() -> None:
    pair = PreferencePair("The film", "The film is a film.", "The film bores.")
    rows = pair.as_text()
    assert rows == {"prompt": PREFIX + "The film", "chosen": " is a film.", "rejected": " bores."}
    assert rows["prompt"] + rows["chosen"] == PREFIX + pair.chosen


def test_a_conversation_in_the_template_is_its_prompt_and_then_the_answer(tiny_tokenizer: Any) -> None:
    rows = PreferencePair("The film", "The film is a film.", "The film bores.").as_messages()
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    prompt = tiny_tokenizer.apply_chat_template(rows["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tiny_tokenizer.apply_chat_template(rows["prompt"] + rows["chosen"], tokenize=False)
    assert prompt.startswith("<bos><start_of_turn>user\n")
    assert prompt.endswith("<start_of_turn>model\n")
    assert whole == prompt + "The film is a film.<end_of_turn>\n"


def test_reviews_are_read_from_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reviews.tsv").write_text("1.5\tGood fun.\n-2.0\tNo, no.\n", encoding="utf-8")
    monkeypatch.setattr(reviews, "movie_reviews", lambda: tmp_path / "reviews.tsv")
    assert reviews.rated_reviews() == [Review("Good fun.", 1.5), Review("No, no.", -2.0)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opening_words": 0}, "opening_words=0"),
        ({"least_sentiment": 0.0}, "least_sentiment=0.0"),
        ({"least_sentiment": float("nan")}, "least_sentiment=nan"),
        ({"max_words": 2}, "max_words=2"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        preference_split([Review("The film sings", 2.0)], **options)


def test_reviews_without_pairs_are_refused() -> None:
    with pytest.raises(TrimtabError, match="0 openings"):
        preference_split([Review("The film sings", 2.0), Review("It is dire", -2.0)])
