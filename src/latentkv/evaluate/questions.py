"""What a model is asked, with the answer that counts: as plain text that it goes on with, or as a conversation."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

EDGES = string.punctuation + string.whitespace + "“”‘’«»—–…"
"""What may stand around an answer."""


@dataclass(frozen=True)
class Question:
    """One question in both forms.

    Attributes:
        asked: of a model that converses.
        opening: plain text that the answer follows.
        answer: the right one.
    """

    asked: str
    opening: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A question as it is put.

    Attributes:
        question: that is to be answered.
        shots: others that stand before it, answered.
        context: text that stands before all of them.
    """

    question: Question
    shots: tuple[Question, ...] = ()
    context: str = ""

    def as_text(self) -> str:
        """Plain text, to be gone on with."""
        shots = (f"{shot.opening} {shot.answer}" for shot in self.shots)
        return "\n\n".join(part for part in (self.context, *shots, self.question.opening) if part)

    def as_messages(self) -> list[dict[str, str]]:
        """A conversation, to be answered."""
        messages: list[dict[str, str]] = []
        for shot in (*self.shots, self.question):
            messages += [{"role": "user", "content": shot.asked}, {"role": "assistant", "content": shot.answer}]
        first = messages[0]
        first["content"] = "\n\n".join(part for part in (self.context, first["content"]) if part)
        return messages[:-1]


def with_shots(questions: Sequence[Question], *, samples: int, shots: int, rng: random.Random) -> list[Example]:
    """So many of these questions, none twice, each after `shots` others; there must be more of them than shots."""
    examples: list[Example] = []
    for question in rng.sample(questions, min(samples, len(questions))):
        others = [other for other in rng.sample(questions, shots + 1) if other != question]
        examples.append(Example(question, tuple(others[:shots])))
    return examples


def is_answer(text: str, answer: str) -> bool:
    """Whether a text begins with the words of an answer, exactly, but for blanks and for punctuation at both ends."""
    words = answer.split()
    return " ".join(text.split()[: len(words)]).strip(EDGES) == " ".join(words).strip(EDGES)
