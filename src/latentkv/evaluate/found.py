"""What an evaluation has found so far, as it is kept: sums of windows and answers word for word, of which all figures
are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentkv.evaluate.questions import is_answer


@dataclass(frozen=True)
class TextFound:
    """Of the scored text; each list has a value a window.

    Attributes:
        bytes: of the text in UTF-8.
        tokens: that were predicted.
        nats: -log p of these.
        source_tokens: as the source's tokenizer cuts the text; None without a source.
        source_nats: -log p of these by the source.
        divergence: KL(source || model) in nats; None where the two have other tokens, and then the windows differ.
        same: places in which the likeliest token is the same.
    """

    bytes: int
    tokens: list[int]
    nats: list[float]
    source_tokens: list[int] | None = None
    source_nats: list[float] | None = None
    divergence: list[float] | None = None
    same: list[int] | None = None


@dataclass(frozen=True)
class Answer:
    """To one question.

    Attributes:
        wanted: the right one.
        model: what the model said.
        source: what the source said; None without one.
        depth: where the sentence is hidden that it is about, in percent; None where nothing is hidden.
    """

    wanted: str
    model: str
    source: str | None
    depth: int | None

    @property
    def right(self) -> bool:
        """Whether the model's is right."""
        return is_answer(self.model, self.wanted)

    @property
    def source_right(self) -> bool:
        """Whether the source's is right; False without one."""
        return self.source is not None and is_answer(self.source, self.wanted)


@dataclass(frozen=True)
class CellFound:
    """Answers to questions that are asked one after another, or together.

    Attributes:
        task: name of the task.
        length: tokens of the prompts; None where the task has no lengths.
        number: tells them from others of the same task and length.
        answers: one a question.
    """

    task: str
    length: int | None
    number: int
    answers: list[Answer]


@dataclass
class Found:
    """All of it."""

    text: TextFound | None = None
    cells: list[CellFound] = field(default_factory=list[CellFound])

    def has(self, task: str, length: int | None, number: int) -> bool:
        """Whether a cell's questions are answered."""
        return any((cell.task, cell.length, cell.number) == (task, length, number) for cell in self.cells)
