"""Preference pairs of made-up stories: one opening, and a glad and a sad way to go on that differ in nothing else.

`python examples/stories.py > examples/stories.jsonl` writes them anew; the tests compare.
"""

import json

from trimtab.gallery.testbeds.text import stories

PAIRS = 256


def pair(number: int) -> dict[str, str]:
    """The pair `number`: prompt, chosen (positive) and rejected (negative)."""
    (glad,), (sad,) = (
        stories(1, seed=number, sentiment=sentiment, topic="garden") for sentiment in ("positive", "negative")
    )
    opening, glad_rest = glad.text.split(". ", 1)
    same, sad_rest = sad.text.split(". ", 1)
    assert opening == same
    return {"prompt": f"{opening}.", "chosen": f" {glad_rest}", "rejected": f" {sad_rest}"}


if __name__ == "__main__":
    for number in range(PAIRS):
        print(json.dumps(pair(number)))
