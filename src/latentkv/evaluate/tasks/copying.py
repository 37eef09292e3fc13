"""`copy`: a sentence that is to be repeated word for word."""

from __future__ import annotations

import random

from latentkv.errors import RequestError
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import Example, Question, with_shots

FEWEST_WORDS, MOST_WORDS = 12, 30
"""Of a sentence."""


def copy_examples(text: Text, *, samples: int, shots: int, seed: int) -> list[Example]:
    """So many sentences of a text (fewer, where there are not as many), each after others with their copies.

    Raises:
        RequestError: the text has too few sentences.
    """
    rng = random.Random(f"{seed} copy")
    questions = [
        Question(f"Repeat this text word for word:\n\n{sentence}", f"Text: {sentence}\nCopy:", sentence)
        for sentence in dict.fromkeys(text.sentences)
        if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS
    ]
    if len(questions) <= shots:
        raise RequestError(
            f"The text has {len(questions)} sentences of {FEWEST_WORDS} to {MOST_WORDS} words: copy needs {shots + 1} "
            "and more, so name a longer one, or leave out copy."
        )
    return with_shots(questions, samples=samples, shots=shots, rng=rng)
