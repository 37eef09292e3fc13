"""`cloze`: the last word of a paragraph (as LAMBADA asks, Paperno et al. 2016, but of any paragraph)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from latentkv.errors import RequestError
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import EDGES, Example, Question, with_shots

FEWEST_WORDS, MOST_WORDS = 30, 120
"""Of a paragraph; of a longer one its end is shown."""


def cloze_examples(text: Text, *, samples: int, shots: int, seed: int) -> list[Example]:
    """So many paragraphs of a text without their last word (fewer, where there are not as many), each after whole ones.

    Raises:
        RequestError: the text has too few paragraphs.
    """
    rng = random.Random(f"{seed} cloze")
    questions = list(_questions(text))
    if len(questions) <= shots:
        raise RequestError(
            f"The text has {len(questions)} paragraphs of {FEWEST_WORDS} words that end with a word: cloze needs "
            f"{shots + 1} and more, so name a longer one, or leave out cloze."
        )
    return with_shots(questions, samples=samples, shots=shots, rng=rng)


def _questions(text: Text) -> Iterator[Question]:
    for paragraph in dict.fromkeys(text.paragraphs):
        words = paragraph.split()
        last = words[-1].strip(EDGES)
        if len(words) >= FEWEST_WORDS and len(last) > 1 and last.isalpha():
            passage = " ".join(words[-MOST_WORDS:-1])
            yield Question(f"Which word comes next? Answer with that word alone:\n\n{passage}", passage, last)
