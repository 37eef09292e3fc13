"""Which questions an evaluation asks: those of a task together; of lookup, those of each passage by its depths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from latentkv.errors import RequestError
from latentkv.evaluate.asking import Asker, longest
from latentkv.evaluate.options import EvaluateOptions
from latentkv.evaluate.passages import Text
from latentkv.evaluate.questions import Example
from latentkv.evaluate.tasks.arithmetic import arithmetic_examples
from latentkv.evaluate.tasks.cloze import cloze_examples
from latentkv.evaluate.tasks.copying import copy_examples
from latentkv.evaluate.tasks.lookup import lookup_examples
from latentkv.sizes import format_tokens

_MOST_CHARACTERS = 16
"""Of a token, on average: a text with so many for each token need not be counted."""


@dataclass(frozen=True)
class Cell:
    """Questions that are asked together; where they have a length, one after another.

    Attributes:
        task: name of it.
        make: builds the examples.
        length: tokens of the prompts, where the task has lengths.
        number: tells them from others of the same task and length.
        depths: of each example in percent, where the task has these.
    """

    task: str
    make: Callable[[], Sequence[Example]]
    length: int | None = None
    number: int = 0
    depths: Sequence[int] = ()

    @property
    def title(self) -> str:
        """For people."""
        return self.task if self.length is None else f"{self.task}, {format_tokens(self.length)}"


@dataclass(frozen=True)
class Asked:
    """All that is asked.

    Attributes:
        cells: in order.
        notes: what is left out, and why.
    """

    cells: Sequence[Cell]
    notes: Sequence[str]

    @classmethod
    def of(cls, text: Text, options: EvaluateOptions, askers: Sequence[Asker]) -> Asked:
        """What the options mean for these models and this text.

        Raises:
            RequestError: the text is too short for a task, or a length for a question.
        """
        cells: list[Cell] = []
        notes: list[str] = []
        given = {"samples": options.samples, "shots": options.shots, "seed": options.seed}
        for task in options.task_names:
            if task == "lookup":
                lengths = [length for length in sorted(set(options.lengths)) if _possible(length, text, askers, notes)]
                cells += _lookups(text, options, askers, lengths)
                continue
            examples = {
                "copy": partial(copy_examples, text),
                "arithmetic": arithmetic_examples,
                "cloze": partial(cloze_examples, text),
            }[task](**given)
            if len(examples) < options.samples:
                notes.append(f"{task}: the text is enough for {len(examples)} questions")
            _require_room(task, examples, askers)
            cells.append(Cell(task, lambda examples=examples: examples))
        return cls(cells, notes)


def _lookups(text: Text, options: EvaluateOptions, askers: Sequence[Asker], lengths: Sequence[int]) -> Iterator[Cell]:
    """A cell for each passage of text, from its last depth to its first: what stands before a hidden sentence is in the
    cache by then."""

    def size(example: Example) -> int:
        return max(asker.size(example) for asker in askers)

    depths = sorted(set(options.depths), reverse=True)
    for length in lengths:
        for number in range(-(-options.samples // len(depths))):
            given = {"length": length, "depths": depths, "number": number, "shots": options.shots, "seed": options.seed}
            yield Cell("lookup", partial(lookup_examples, text, size=size, **given), length, number, depths)


def _possible(length: int, text: Text, askers: Sequence[Asker], notes: list[str]) -> bool:
    """Whether there can be prompts of a length; if not, a note says why."""
    for asker in askers:
        if length > (most := longest(asker.llm)):
            notes.append(f"lookup at {format_tokens(length)} is left out: {asker.name} holds {most:,} tokens")
            return False
    if text.num_characters < _MOST_CHARACTERS * length and (tokens := askers[0].count(text.sentences)) < length:
        notes.append(f"lookup at {format_tokens(length)} is left out: the text has {tokens:,} tokens")
        return False
    return True


def _require_room(task: str, examples: Sequence[Example], askers: Sequence[Asker]) -> None:
    for asker in askers:
        needed, most = max(map(asker.size, examples)), longest(asker.llm)
        if needed > most:
            raise RequestError(
                f"{task} needs {needed:,} tokens for a question with its shots, and {asker.name} holds "
                f"{most:,}: give fewer --shots, or leave it out of --tasks."
            )
