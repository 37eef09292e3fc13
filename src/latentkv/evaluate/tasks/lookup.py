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
    text: Text, *, length: int, depth: int, samples: int, shots: int, seed: int, size: Size
) -> list[Example]:
    """So many prompts of a length, each with the sentence that is asked for at the same depth.

    There are as many other sentences with numbers as there are shots, which ask for these. Prompts of another depth
    have the same text, numbers and shots.

    Args:
        text: that the sentences are hidden in.
        length: tokens of prompt and answer at most.
        depth: where the sentence is hidden, in percent of the text's sentences.
        samples: how many.
        shots: questions with answers before the one that is asked.
        seed: of places, numbers and the passages of the text.
        size: of an example.

    Raises:
        RequestError: not even the questions fit into the length.
    """
    return [
        _example(text, length, depth, shots, random.Random(f"{seed} lookup {length} {i}"), size) for i in range(samples)
    ]


def _example(text: Text, length: int, depth: int, shots: int, rng: random.Random, size: Size) -> Example:
    numbers = rng.sample(range(10_000, 100_000), shots + 1)
    question, *others = [
        _question(place, number) for place, number in zip(rng.sample(_PLACES, shots + 1), numbers, strict=True)
    ]
    start = rng.randrange(len(text.sentences))
    sentences = text.sentences[start:] + text.sentences[:start]
    places = [depth / 100, *(rng.random() for _ in others)]
    hidden = [f"{each.opening} {each.answer}." for each in (question, *others)]

    def with_sentences(count: int) -> Example:
        return Example(question, tuple(others), _hide(sentences[:count], hidden, places))

    most = min(len(sentences), max(1, length // _FIRST_TRY))
    while most < len(sentences) and size(with_sentences(most)) <= length:
        most = min(2 * most, len(sentences))
    too_many = bisect_right(range(most + 1), length, key=lambda count: size(with_sentences(count)))
    if too_many == 0:
        raise RequestError(
            f"--lengths {length} is too short for a question of lookup with {shots} shots: give a longer one, or fewer "
            "--shots."
        )
    return with_sentences(too_many - 1)


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
