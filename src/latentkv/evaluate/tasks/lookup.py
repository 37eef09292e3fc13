"""`lookup`: a sentence with a number, hidden in text of a given length, and asked for at its end."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import chain

from latentkv.errors import RequestError
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import Example, Question

_PLACES = (
    *("Aachen", "Bergen", "Cadiz", "Dakar", "Evora", "Fargo", "Genoa", "Havana", "Izmir", "Jaipur", "Kazan", "Lagos"),
    *(
        "Malmo",
        "Nairobi",
        "Osaka",
        "Porto",
        "Quito",
        "Riga",
        "Sofia",
        "Tunis",
        "Utrecht",
        "Varna",
        "Winnipeg",
        "Yerevan",
    ),
)
_FIRST_TRY = 16
"""Tokens that a sentence may have about, to begin the search for how many fit."""

Size = Callable[[Example], int]
"""Tokens of an example as it is put, with those that its answer may take."""


def lookup_examples(
    text: Text, *, length: int, depths: Sequence[int], number: int, shots: int, seed: int, size: Size
) -> list[Example]:
    """Prompts of a length that are the same but for the depth of the sentence that is asked for.

    There are as many other sentences with numbers as there are shots, which ask for these.

    Args:
        text: that the sentences are hidden in.
        length: tokens of prompt and answer at most.
        depths: where the sentence is hidden, in percent of the text's sentences; a prompt each.
        number: tells these prompts from others of the length.
        shots: questions with answers before the one that is asked.
        seed: of places, numbers and the passage of the text.
        size: of an example.

    Raises:
        RequestError: not even the questions fit into the length.
    """
    rng = random.Random(f"{seed} lookup {length} {number}")
    values = rng.sample(range(10_000, 100_000), shots + 1)
    question, *others = map(_question, rng.sample(_PLACES, shots + 1), values)
    hidden = [f"{each.opening} {each.answer}." for each in (question, *others)]
    start = rng.randrange(len(text.sentences))
    sentences, elsewhere = text.sentences[start:] + text.sentences[:start], [rng.random() for _ in others]

    def example(count: int, depth: int) -> Example:
        return Example(question, tuple(others), _hide(sentences[:count], hidden, [depth / 100, *elsewhere]))

    most = min(len(sentences), max(1, length // _FIRST_TRY))
    while most < len(sentences) and size(example(most, depths[0])) <= length:
        most = min(2 * most, len(sentences))
    count = bisect_right(range(most + 1), length, key=lambda count: size(example(count, depths[0]))) - 1
    while count >= 0 and any(size(example(count, depth)) > length for depth in depths[1:]):
        count -= 1  # the same text may be cut into a token more or less
    if count < 0:
        raise RequestError(
            f"--lengths {length} is too short for a question of lookup with {shots} shots: give a longer one, or fewer "
            "--shots."
        )
    return [example(count, depth) for depth in depths]


def _hide(sentences: Sequence[str], hidden: Sequence[str], places: Sequence[float]) -> str:
    """The sentences with the hidden ones among them, each after a part of them."""
    at = [round(place * len(sentences)) for place in places]
    before = (
        [line for line, where in zip(hidden, at, strict=True) if where == index] for index in range(len(sentences) + 1)
    )
    return " ".join(
        chain.from_iterable(([*lines, *sentences[index : index + 1]]) for index, lines in enumerate(before))
    )


def _question(place: str, number: int) -> Question:
    opening = f"The secret number of {place} is"
    return Question(f"What is the secret number of {place}? Answer with the number alone.", opening, str(number))
