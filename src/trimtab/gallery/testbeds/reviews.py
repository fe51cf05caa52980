"""Preference pairs and prompts from film reviews whose sentiment people have rated.

    pair     two reviews that begin with the same words: one of sentiment >= s (chosen), one of <= -s (rejected)
    prompt   those words behind "Film review: "; both answers are what their authors really wrote next

So a pair differs in sentiment and not in its prompt, both answers are natural text of much the same length (within
an opening, pairs are matched such that the lengths differ least in sum), and what a model learns from them shows in
how it goes on from an opening that no pair had. Three parts have no review in common, and the first two no opening:

    train      pairs to learn from
    held_out   pairs of other openings: preference accuracy; their prompts are what a model goes on from
    others     every review in no pair, for a judge of sentiment

The reviews are those of `real_models.movie_reviews`: one sentence or two each, rated in [-4, 4] by some twenty people.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.real_models import movie_reviews

__all__ = [
    "CHAT_TEMPLATE",
    "PREFIX",
    "PreferencePair",
    "Review",
    "ReviewSplit",
    "preference_split",
    "rated_reviews",
]

PREFIX = "Film review: "
REQUEST = "Write a film review that begins with: "
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Gemma's turns; the base models' tokenizers know the tokens and have no template of their own."""


@dataclass(frozen=True)
class Review:
    """A review and the mean of its ratings, in [-4, 4]."""

    text: str
    sentiment: float


@dataclass(frozen=True)
class PreferencePair:
    """Two reviews that begin with the words `opening`; the chosen one likes its film, the rejected one does not."""

    opening: str
    chosen: str
    rejected: str

    def as_text(self) -> dict[str, str]:
        """As TRL's standard preference format; an answer begins with the space that ends its prompt's last word."""
        prompt = PREFIX + self.opening
        return {"prompt": prompt, "chosen": self._rest(self.chosen), "rejected": self._rest(self.rejected)}

    def as_messages(self) -> dict[str, list[dict[str, str]]]:
        """As TRL's conversational preference format; an answer is a whole review."""
        return {
            "prompt": [{"role": "user", "content": REQUEST + self.opening}],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }

    def _rest(self, text: str) -> str:
        return text.removeprefix(self.opening)


@dataclass(frozen=True)
class ReviewSplit:
    """Pairs to train on, pairs of other openings, and the reviews that are in no pair."""

    train: tuple[PreferencePair, ...]
    held_out: tuple[PreferencePair, ...]
    others: tuple[Review, ...]


def rated_reviews() -> list[Review]:
    """All 10,605 reviews, in the order of the file. Raises RealModelUnavailable where it cannot be had."""
    rows = (line.split("\t") for line in movie_reviews().read_text(encoding="utf-8").splitlines())
    return [Review(text, float(sentiment)) for sentiment, text in rows]


def preference_split(
    reviews: Sequence[Review],
    *,
    opening_words: int = 2,
    least_sentiment: float = 1.0,
    max_words: int = 24,
    held_out: float = 0.25,
    seed: int = 0,
) -> ReviewSplit:
    """Pairs of `reviews` with the same first `opening_words` words, split by opening; each review in one part only.

    A review can be half of a pair if its sentiment is at least `least_sentiment` away from 0 and it has at most
    `max_words` words and some beyond its opening. Openings are shuffled by `seed` and held out until `held_out` of
    the pairs are; all three parts are shuffled, so that any first n of one are a sample of it.

    Raises `TrimtabError` for an `opening_words` below 1, a `least_sentiment` not above 0, a `max_words` not above
    `opening_words`, a `held_out` outside (0, 1), and reviews that give fewer than two openings with pairs.
    """
    if opening_words < 1:
        raise TrimtabError(f"opening_words={opening_words} must be at least 1.")
    if not least_sentiment > 0:
        raise TrimtabError(f"least_sentiment={least_sentiment} must be above 0.")
    if max_words <= opening_words:
        raise TrimtabError(f"max_words={max_words} must be above opening_words={opening_words}.")
    if not 0 < held_out < 1:
        raise TrimtabError(f"held_out={held_out} must lie between 0 and 1.")
    groups = _pairs_by_opening(reviews, opening_words, least_sentiment, max_words)
    if len(groups) < 2:
        raise TrimtabError(f"reviews has {len(groups)} openings with a pair, and both parts need one.")
    generator = random.Random(seed)
    generator.shuffle(groups)
    total = sum(len(group) for group in groups)
    train: list[PreferencePair] = []
    held: list[PreferencePair] = []
    for index, group in enumerate(groups):
        last_and_none_to_train_on = index == len(groups) - 1 and not train
        (train if len(held) >= held_out * total or last_and_none_to_train_on else held).extend(group)
    generator.shuffle(train)
    generator.shuffle(held)
    used = {text for pair in train + held for text in (pair.chosen, pair.rejected)}
    others = [review for review in reviews if review.text not in used]
    generator.shuffle(others)
    return ReviewSplit(tuple(train), tuple(held), tuple(others))


def _pairs_by_opening(
    reviews: Sequence[Review], opening_words: int, least_sentiment: float, max_words: int
) -> list[list[PreferencePair]]:
    """For each opening that has reviews of both kinds, as many pairs as the rarer kind has reviews."""
    liked: dict[str, list[str]] = defaultdict(list)
    disliked: dict[str, list[str]] = defaultdict(list)
    # Texts that stand twice are one review; a text has single spaces, so that words and spaces give it back.
    for review in {review.text: review for review in reviews}.values():
        words = review.text.split(" ")
        if abs(review.sentiment) >= least_sentiment and opening_words < len(words) <= max_words:
            kind = liked if review.sentiment > 0 else disliked
            kind[" ".join(words[:opening_words])].append(review.text)
    return [
        [PreferencePair(opening, *texts) for texts in _matched(liked[opening], disliked[opening])]
        for opening in liked
        if opening in disliked
    ]


def _matched(first: list[str], second: list[str]) -> list[tuple[str, str]]:
    """As many pairs as the shorter list has texts, such that the sum of the differences in words is least."""
    from scipy.optimize import linear_sum_assignment

    one, other = ([len(text.split()) for text in texts] for texts in (first, second))
    rows, columns = linear_sum_assignment(np.abs(np.subtract.outer(one, other)))
    return [(first[row], second[column]) for row, column in zip(rows, columns, strict=True)]
