"""`evaluate_model`: the order of things; what was found before is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentkv.evaluate.asking import Asker, longest, require_tokenizer
from latentkv.evaluate.cells import Asked, Cell
from latentkv.evaluate.folder import EvaluationFolder
from latentkv.evaluate.found import Answer, CellFound, Found
from latentkv.evaluate.options import EvaluateOptions
from latentkv.evaluate.passages import Text
from latentkv.evaluate.report import Report, report_tasks, report_text
from latentkv.evaluate.scoring import score_pieces
from latentkv.llm import LLM

OnProgress = Callable[[str, int, int], object]
"""Called with what is done, how much of it, and of how much."""

_READ_BY = (".safetensors", ".gguf", ".json")
"""Ends of the names of files that a model is."""


@dataclass(frozen=True)
class Evaluated:
    """A model, and what is said of it.

    Attributes:
        llm: the model.
        name: what it is called.
        settings: how it was loaded: what an evaluation that is gone on with must have had, too.
    """

    llm: LLM
    name: str
    settings: Mapping[str, Any]


def evaluate_model(
    model: Evaluated,
    source: Evaluated | None,
    text: Text,
    options: EvaluateOptions,
    *,
    facts: Mapping[str, Any],
    folder: EvaluationFolder | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Report:
    """Score text and ask questions.

    Args:
        model: what is evaluated.
        source: what is asked the same beside it; None: nothing.
        text: held out of the training of both.
        options: what to measure.
        facts: for the report: command and environment.
        folder: where it is kept, and gone on with; None: nowhere.
        on_progress: called with each step.

    Raises:
        RequestError: a model has no tokenizer, the text is too short for a task, or `folder` has another evaluation.
    """
    return _Run(model, source, text, options, facts, folder).finish(on_progress)


class _Run:
    def __init__(
        self,
        model: Evaluated,
        source: Evaluated | None,
        text: Text,
        options: EvaluateOptions,
        facts: Mapping[str, Any],
        folder: EvaluationFolder | None,
    ) -> None:
        self._model, self._source, self._text, self._options = model, source, text, options
        self._facts, self._folder = facts, folder
        both = [each for each in (model, source) if each is not None]
        with_template = all(require_tokenizer(each.llm).chat_template_source == "checkpoint" for each in both)
        self._chat = with_template if options.chat is None else options.chat
        self._askers = [Asker(each.llm, each.name, chat=self._chat) for each in both]
        self._window = min(options.window, *(longest(each.llm) for each in both))
        self._asked = Asked.of(text, options, self._askers)
        self._about = self._description()
        self._found = folder.found(self._about) if folder else Found()

    def finish(self, on_progress: OnProgress) -> Report:
        """Do what is not done yet."""
        if self._found.text is None:
            self._found.text = score_pieces(
                self._model.llm,
                self._source and self._source.llm,
                self._text.pieces(self._options.text_bytes),
                self._window,
                lambda done, total: on_progress("windows of text", done, total),
            )
            self._keep()
        for done, cell in enumerate(self._asked.cells):
            on_progress(f"questions ({cell.title})", done, len(self._asked.cells))
            if not self._found.has(cell.task, cell.length, cell.number):
                self._found.cells.append(self._ask(cell))
                self._keep()
        return self._keep()

    def _ask(self, cell: Cell) -> CellFound:
        examples, in_turn = cell.make(), cell.length is not None
        said = [asker.answer(examples, in_turn=in_turn) for asker in self._askers]
        sources = said[1] if self._source else [None] * len(examples)
        answers = [
            Answer(example.question.answer, ours, theirs, depth)
            for example, ours, theirs, depth in zip(
                examples, said[0], sources, cell.depths or [None] * len(examples), strict=True
            )
        ]
        return CellFound(cell.task, cell.length, cell.number, answers)

    def _keep(self) -> Report:
        """The report of what is known by now, written where it is to be kept."""
        found = self._found
        report = Report(
            model=self._model.name,
            source=self._source and self._source.name,
            texts=self._text.names,
            facts=self._facts,
            options=asdict(self._options),
            window=self._window,
            chat=self._chat,
            notes=[*self._notes(), *self._asked.notes],
            text=found.text and report_text(found.text),
            tasks=report_tasks(found.cells),
        )
        if self._folder:
            self._folder.write(report, found, self._about)
        return report

    def _notes(self) -> list[str]:
        """What was done otherwise than asked of the scored text."""
        notes: list[str] = []
        if self._window < self._options.window:
            notes.append(f"text is read in windows of {self._window:,} tokens, which is what there is room for")
        if self._source and self._found.text and self._found.text.divergence is None:
            notes.append("the two models cut the text into other tokens: only their bits a byte can be compared")
        return notes

    def _description(self) -> dict[str, Any]:
        """What an evaluation is known by that is gone on with; further tasks and lengths may be asked of it."""
        options = {name: value for name, value in asdict(self._options).items() if name not in ("tasks", "lengths")}
        return options | {
            "text": self._text.digest,
            "chat": self._chat,
            "window": self._window,
            "depths": sorted(set(self._options.depths)),
            "model": _describe(self._model),
            "source": self._source and _describe(self._source),
        }


def _describe(model: Evaluated) -> dict[str, Any]:
    """A model by its files, their sizes and times, and by how it was loaded."""
    path = model.llm.folder
    files: Sequence[Path] = sorted(path.iterdir()) if path.is_dir() else [path]
    states = {each.name: each.stat() for each in files if each.suffix in _READ_BY}
    return {
        "files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
        "settings": dict(model.settings),
    }
