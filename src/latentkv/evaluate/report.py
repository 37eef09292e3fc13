"""The figures of an evaluation: every number that is printed, drawn or kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentkv.evaluate.found import Answer, CellFound, Found, TextFound
from latentkv.evaluate.options import TASKS
from latentkv.evaluate.statistics import Estimate, Paired, Share, paired, per_unit, share


@dataclass(frozen=True)
class TextScore:
    """How a model predicts the text.

    Attributes:
        perplexity: exp(nats a token); None where it is too large for a float.
        bits_per_byte: comparable between tokenizers.
        tokens: that were predicted.
    """

    perplexity: Estimate | None
    bits_per_byte: Estimate
    tokens: int


@dataclass(frozen=True)
class TextPair:
    """A model beside its source, on the same tokens; the errors are those of pairs of windows.

    Attributes:
        difference: -log q of the model less -log p of the source, nats a token.
        perplexity_ratio: exp of it; None where it is too large for a float.
        divergence: KL(source || model), nats a token.
        agreement: share of places in which the likeliest token is the source's.
    """

    difference: Estimate
    perplexity_ratio: Estimate | None
    divergence: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class TextReport:
    """Of the scored text.

    Attributes:
        windows: the model's.
        bytes: of the text in UTF-8.
        model: its score.
        source: that of the source, if there is one.
        pair: one beside the other; None without a source, or where the two cut the text into other tokens.
    """

    windows: int
    bytes: int
    model: TextScore
    source: TextScore | None
    pair: TextPair | None


@dataclass(frozen=True)
class CellReport:
    """Answers of a task at one length and depth."""

    length: int
    depth: int
    model: Share
    source: Share | None


@dataclass(frozen=True)
class TaskReport:
    """A task.

    Attributes:
        name: of it.
        model: right answers.
        source: right answers of the source, if there is one.
        pair: one beside the other.
        cells: the answers by length and depth, where the task has these.
    """

    name: str
    model: Share
    source: Share | None
    pair: Paired | None
    cells: Sequence[CellReport]


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        model: its name.
        source: name of the one beside it, if there is one.
        texts: names of the files.
        facts: of the run: command and environment.
        options: how it was asked.
        window: tokens that were read together when text was scored.
        chat: whether by the chat template.
        notes: what was left out, and why.
        text: figures of the scored text, if it is scored by now.
        tasks: those that have answers.
    """

    model: str
    source: str | None
    texts: Sequence[str]
    facts: Mapping[str, Any]
    options: Mapping[str, Any]
    window: int
    chat: bool
    notes: Sequence[str]
    text: TextReport | None
    tasks: Sequence[TaskReport]

    def as_json(self, found: Found | None = None) -> dict[str, Any]:
        """For evaluation.json, with what the figures are made of."""
        content = asdict(self)
        facts = content.pop("facts")
        return facts | content | ({} if found is None else {"found": asdict(found)})


def report_text(found: TextFound) -> TextReport:
    """Figures of the windows."""
    model = _score(found.tokens, found.nats, found.bytes)
    source = pair = None
    if found.source_tokens is not None and found.source_nats is not None:
        source = _score(found.source_tokens, found.source_nats, found.bytes)
        if found.divergence is not None and found.same is not None:
            differences = [ours - theirs for ours, theirs in zip(found.nats, found.source_nats, strict=True)]
            difference = per_unit(differences, found.tokens)
            pair = TextPair(
                difference=difference,
                perplexity_ratio=difference.exp(),
                divergence=per_unit(found.divergence, found.tokens),
                agreement=per_unit(found.same, found.tokens),
            )
    return TextReport(len(found.tokens), found.bytes, model, source, pair)


def report_tasks(cells: Sequence[CellFound]) -> list[TaskReport]:
    """Figures of the answers, a task each that has some."""
    return [_task(name, own) for name in TASKS if (own := [cell for cell in cells if cell.task == name])]


def _score(tokens: Sequence[int], nats: Sequence[float], num_bytes: int) -> TextScore:
    a_token, total = per_unit(nats, tokens), sum(tokens)
    return TextScore(a_token.exp(), a_token.times(total / (math.log(2) * num_bytes)), total)


def _task(name: str, cells: Sequence[CellFound]) -> TaskReport:
    answers = [answer for cell in cells for answer in cell.answers]
    model, source = _shares(answers)
    pair = None
    if source is not None:
        pair = paired([answer.right for answer in answers], [answer.source_right for answer in answers])
    places: dict[tuple[int, int], list[Answer]] = {}
    for cell in cells:
        for answer in cell.answers:
            if cell.length is not None and answer.depth is not None:
                places.setdefault((cell.length, answer.depth), []).append(answer)
    by_place = [CellReport(length, depth, *_shares(own)) for (length, depth), own in sorted(places.items())]
    return TaskReport(name, model, source, pair, by_place)


def _shares(answers: Sequence[Answer]) -> tuple[Share, Share | None]:
    """Right ones of the model, and of the source if it was asked."""
    beside = all(answer.source is not None for answer in answers)
    source = share([answer.source_right for answer in answers]) if beside else None
    return share([answer.right for answer in answers]), source
