"""What is evaluated and how, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from latentkv.errors import RequestError
from latentkv.option_types import Flag, Numbers, Words
from latentkv.ranges import require_ranges

TASKS = ("copy", "arithmetic", "cloze", "lookup")
"""In the order in which they are asked: what takes longest last."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        text_bytes: about how much of the text to score, in pieces from all over it.
        window: tokens that are read together when text is scored; each window is one sample of the standard errors.
        tasks: what to ask, with commas between: copy, arithmetic, cloze, lookup; or all, or none.
        samples: questions of each task; of lookup, of each length, as many at each depth.
        shots: questions with their answers that stand before each question.
        lengths: tokens of lookup's prompts, with commas between; those that the model cannot hold are left out, and
            said.
        depths: where in the prompt lookup's line is hidden, in percent, with commas between.
        chat: ask by the chat template; None is whether the model has one.
        seed: of what is asked.
    """

    text_bytes: int = 100_000
    window: int = 512
    tasks: Words = ("all",)
    samples: int = 20
    shots: int = 3
    lengths: Numbers = (1024, 2048, 4096, 8192, 16384)
    depths: Annotated[Numbers, Flag(show=lambda depths: ",".join(map(str, depths)))] = (0, 25, 50, 75, 100)
    chat: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        require_ranges(self, RequestError)
        for name in ("lengths", "depths"):
            if not getattr(self, name):
                raise RequestError(f"--{name} names none: write one or more numbers with commas between.")
        _ = self.task_names

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that are meant, each once, in the order in which they are asked.

        Raises:
            RequestError: one is not known, or all or none stands beside others.
        """
        if self.tasks == ("all",):
            return TASKS
        if self.tasks == ("none",):
            return ()
        for name in self.tasks:
            if name not in TASKS:
                raise RequestError(f"--tasks: {name!r} is no task: choose of {', '.join(TASKS)}, or say all, or none.")
        return tuple(name for name in TASKS if name in self.tasks)
