"""`arithmetic`: sums of two numbers of two digits."""

from __future__ import annotations

import random

from latentkv.evaluate.questions import Example, Question


def arithmetic_examples(*, samples: int, shots: int, seed: int) -> list[Example]:
    """So many sums, each after others with their results."""
    rng = random.Random(f"{seed} arithmetic")
    return [_example(rng, shots) for _ in range(samples)]


def _example(rng: random.Random, shots: int) -> Example:
    # Numbers for two-digit pairs without repetition, so that no sum stands among its own shots.
    pairs = [divmod(number, 90) for number in rng.sample(range(90 * 90), shots + 1)]
    question, *others = [_question(10 + a, 10 + b) for a, b in pairs]
    return Example(question, tuple(others))


def _question(a: int, b: int) -> Question:
    return Question(f"What is {a} + {b}? Answer with the number alone.", f"{a} + {b} =", str(a + b))
