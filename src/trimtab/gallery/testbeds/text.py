"""Text whose truth is known: public-domain English, and made-up stories of known sentiment and topic.

*English*: some 760 kB of Shakespeare and Milton, and one play that no recipe trains on; `data/README.md` has
the provenance. *Stories*: drawn from a small grammar. A story's sentiment words all come from the lexicon of
its sentiment, its topic words from that of its topic, and no word is in two lexicons. So two scorers recover
the truth of any story without fail, and measure any other text (what a steered model writes) by the same
lexicons:

    sentiment_score(text) = (P - N) / (P + N)      P, N: how many positive and negative words the text has

A story's first sentence has a topic and no sentiment: with it as the prompt, a model may go on either way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.core.errors import TrimtabError, unknown

__all__ = [
    "ENGLISH",
    "ENGLISH_HELD_OUT",
    "SENTIMENTS",
    "TOPICS",
    "Story",
    "sentiment_score",
    "stories",
    "topic_of",
]

DATA = Path(__file__).with_name("data")
ENGLISH = DATA / "english.txt"
ENGLISH_HELD_OUT = DATA / "english_held_out.txt"


@dataclass(frozen=True)
class Story:
    """A story and what is true of it."""

    text: str
    sentiment: str
    topic: str


# Slots that a sentiment fills. A word serves one sentiment only, and no word of a topic is among them.
SENTIMENT_SLOTS = {
    "positive": {
        "quality": "lovely|wonderful|beautiful|splendid|perfect|delightful|excellent|charming|glorious",
        "feeling": "happy|glad|proud|cheerful|merry|thankful|hopeful|joyful|grateful",
        "manner": "happily|gladly|cheerfully|merrily|proudly|joyfully|gently|kindly",
        "did": "smiled|laughed|cheered|danced|sang",
        "said": "laughed|cheered|sang|beamed",
        "noun": "joy|delight|luck|kindness|laughter|happiness|friendship|love",
    },
    "negative": {
        "quality": "awful|ugly|terrible|horrible|dreadful|nasty|rotten|ruined|hateful",
        "feeling": "sad|lonely|angry|afraid|ashamed|miserable|gloomy|hopeless|bitter",
        "manner": "sadly|angrily|bitterly|gloomily|miserably|fearfully|cruelly|harshly",
        "did": "wept|sobbed|frowned|groaned|trembled",
        "said": "sobbed|groaned|wept|wailed",
        "noun": "grief|sorrow|trouble|pain|anger|sadness|cruelty|fear",
    },
}
TOPIC_SLOTS = {
    "sea": {
        "place": "beach|harbour|shore|pier|lighthouse",
        "thing": "boat|shell|crab|net|anchor|sail|fish|oar",
        "scene": "waves|gulls|tide|sand",
    },
    "garden": {
        "place": "orchard|meadow|greenhouse|garden|vineyard",
        "thing": "rose|apple|spade|tulip|wheelbarrow|hedge|pear|seed",
        "scene": "bees|petals|grass|soil",
    },
    "kitchen": {
        "place": "kitchen|bakery|pantry|tavern|dairy",
        "thing": "cake|pie|kettle|loaf|soup|oven|pot|pudding",
        "scene": "steam|flour|butter|plates",
    },
    "school": {
        "place": "school|classroom|library|playground|gymnasium",
        "thing": "book|pencil|map|desk|globe|poem|ruler|notebook",
        "scene": "chalk|pupils|bell|pages",
    },
    "snow": {
        "place": "hill|pond|mountain|forest|glacier",
        "thing": "sled|snowman|icicle|scarf|skate|mitten|snowball|fir",
        "scene": "frost|flakes|ice|drifts",
    },
}
COMMON_SLOTS = {
    "when": "one morning|one evening|on Monday|on Friday|last week|after lunch|before dinner|early that day",
    "went": "walked to|went to|ran to|came to|hurried to|set out for",
    "looked": "looked at|picked up|touched|turned to|thought of|talked about|pointed at",
    "size": "little|big|small|old|new|round|red|blue|green|white",
    "later": "then|after a while|a little later|soon|at last|in the end",
    "kin": "mother|father|sister|brother|uncle|aunt|teacher|neighbour",
}
NAMES = {
    "she": "Anna|Clara|Emma|Grace|Ida|Lucy|Mary|Nora|Rosa|Sophie",
    "he": "Ben|Carl|David|Edward|Frank|Henry|Jack|Oscar|Peter|Tom",
}
OPENINGS = (
    "{when} {name} {went} the {place} with {possessive} {kin} and {friend}.",
    "{when} {name} and {friend} {went} the {place}.",
    "{name} {went} the {place} {when}, and {friend} came along.",
    "there was a {size} {thing} at the {place}, and {when} {name} and {friend} {went} the {place}.",
)
MIDDLES = (
    "the {thing} was {quality}, and {name} {did}.",
    'what a {quality} {thing} it was! "I am so {feeling}," {said} {name}.',
    "{pronoun} {looked} the {size} {thing} and felt {feeling}.",
    "among the {scene} there was a {quality} {thing}.",
    "{later} {friend} {looked} the {thing} and {did} {manner}.",
    'the {scene} made {name} think of {noun}. "It is {quality}," {pronoun} said.',
    "{name} was {feeling}, for the {place} was full of {noun}.",
    '"how {quality} is the {thing}!" {said} {friend}, and {name} {did} too.',
    "{possessive} {kin} spoke {manner} about the {thing}, and {friend} was {feeling}.",
    "{later} {pronoun} {looked} a {size} {thing}, a {quality} {thing} from the {place}.",
)
ENDINGS = (
    "{later} {name} went home, {feeling} and full of {noun}.",
    "that night {name} dreamt of {noun} and of the {quality} {thing}.",
    "{later} {name} and {friend} {did}, and there was {noun} all the way home.",
    "{name} never forgot the {noun} of that day at the {place}.",
    "so the day ended, and {name} {did} {manner}.",
)

SENTIMENTS = tuple(SENTIMENT_SLOTS)
TOPICS = tuple(TOPIC_SLOTS)


LEXICONS = {
    name: frozenset(word for words in slots.values() for word in words.split("|"))
    for name, slots in (SENTIMENT_SLOTS | TOPIC_SLOTS).items()
}


def stories(count: int, *, seed: int, sentiment: str | None = None, topic: str | None = None) -> list[Story]:
    """Draw `count` stories of four to seven sentences (some 300 characters) from the grammar.

    Sentiment and topic are drawn evenly, or are the given ones of `SENTIMENTS` and `TOPICS`. The same
    arguments give the same stories on every machine. Raises TrimtabError for a negative `count` or an
    unknown attribute.
    """
    if count < 0:
        raise TrimtabError(f"count={count} must be 0 or more")
    if sentiment is not None and sentiment not in SENTIMENTS:
        raise unknown("sentiment", sentiment, SENTIMENTS)
    if topic is not None and topic not in TOPICS:
        raise unknown("topic", topic, TOPICS)
    rng = random.Random(seed)
    return [_story(rng, sentiment, topic) for _ in range(count)]


def sentiment_score(text: str) -> float:
    """(P - N) / (P + N) in [-1, 1] of the positive and negative words of `text`; 0 if it has none."""
    positive, negative = _count(text, "positive"), _count(text, "negative")
    return (positive - negative) / max(positive + negative, 1)


def topic_of(text: str) -> str | None:
    """The topic whose words `text` has most of (of equals the first), or None if it has none."""
    counts = {topic: _count(text, topic) for topic in TOPICS}
    best = max(counts, key=lambda topic: counts[topic])
    return best if counts[best] else None


def _count(text: str, lexicon: str) -> int:
    return sum(word in LEXICONS[lexicon] for word in re.findall(r"[a-z]+", text.lower()))


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    # random() alone is promised to draw the same numbers in every version of Python.
    return choices[int(rng.random() * len(choices))]


def _story(rng: random.Random, sentiment: str | None, topic: str | None) -> Story:
    sentiment = sentiment or _pick(rng, SENTIMENTS)
    topic = topic or _pick(rng, TOPICS)
    slots = COMMON_SLOTS | SENTIMENT_SLOTS[sentiment] | TOPIC_SLOTS[topic]
    pronoun = _pick(rng, tuple(NAMES))
    name = _pick(rng, NAMES[pronoun].split("|"))
    everyone = [other for names in NAMES.values() for other in names.split("|")]
    cast = {
        "pronoun": pronoun,
        "possessive": {"she": "her", "he": "his"}[pronoun],
        "name": name,
        "friend": _pick(rng, [other for other in everyone if other != name]),
    }
    cast |= {slot: _pick(rng, slots[slot].split("|")) for slot in ("place", "thing", "kin")}
    left = list(MIDDLES)
    middles = [left.pop(int(rng.random() * len(left))) for _ in range(2 + int(rng.random() * 4))]
    sentences = [_pick(rng, OPENINGS), *middles, _pick(rng, ENDINGS)]
    return Story(" ".join(_fill(rng, sentence, cast, slots) for sentence in sentences), sentiment, topic)


def _fill(rng: random.Random, template: str, cast: dict[str, str], slots: dict[str, str]) -> str:
    """`template` with the story's cast and, for every other slot, a word of its own; articles, capitals."""

    def fill(match: re.Match[str]) -> str:
        return cast.get(match[1]) or _pick(rng, slots[match[1]].split("|"))

    filled = re.sub(r"{(\w+)}", fill, template)
    filled = re.sub(r"\ba(?= [aeiou])", "an", filled)
    return re.sub(r'^"?[a-z]|! [a-z]', lambda match: match[0].upper(), filled)
