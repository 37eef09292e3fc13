"""`copy`: a passage that is to be repeated word for word."""

from __future__ import annotations

import random

from latentkv.errors import RequestError
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import Example, Question

WORDS = 24
"""Of a passage."""


def copy_examples(text: Text, *, samples: int, shots: int, seed: int) -> list[Example]:
    """So many passages of a text, each after others with their copies.

    Raises:
        RequestError: no paragraph of the text is long enough.
    """
    rng = random.Random(f"{seed} copy")
    long = [words for paragraph in text.paragraphs if len(words := paragraph.split()) >= WORDS]
    if not long:
        raise RequestError(f"The text has no paragraph of {WORDS} words to copy: name a longer one, or leave out copy.")

    def question() -> Question:
        words = rng.choice(long)
        start = rng.randrange(len(words) - WORDS + 1)
        passage = " ".join(words[start : start + WORDS])
        return Question(f"Repeat this text word for word:\n\n{passage}", f"Text: {passage}\nCopy:", passage)

    return [Example(question(), tuple(question() for _ in range(shots))) for _ in range(samples)]
