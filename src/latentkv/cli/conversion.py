"""What `latentkv convert` and `latentkv heal` share: their texts, their progress, and what a report says of a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentkv.cli.terminal import console
from latentkv.errors import RequestError
from latentkv.ranges import require_range

if TYPE_CHECKING:
    from torch import Tensor

SELF = "self"
EVAL_SEED = 1_000_000
"""Of the held-out text that the source writes."""


def require_text_options(sequences: int, length: int, *texts: str | None) -> None:
    """Raise `RequestError` for sizes that no model takes, and for a text that is no readable file."""
    require_range("sequences", sequences, RequestError)
    require_range("length", length, RequestError)
    for text in texts:
        if text is None or text == SELF:
            continue
        try:
            with Path(text).open("rb"):
                pass
        except OSError as problem:
            raise RequestError(
                f"{text} cannot be read ({problem.strerror}): name a UTF-8 text file, or self."
            ) from None


def require_length(folder: Path, length: int) -> None:
    """Raise `RequestError` for a length that the model does not take."""
    from latentkv.models.config_reader import read_config

    require_range("length", length, RequestError, high=read_config(folder).max_positions)


def text_tokens(folder: Path, text: str, sequences: int, length: int, *, seed: int, stage: str) -> Tensor:
    """[sequences, length] ids of a file, or of what the source writes with this seed; `stage` is what they are for."""
    from latentkv.convert.text import load_writer, tokens_of_file, tokens_of_model

    if text != SELF:
        with console(stderr=True).status(f"{stage}: read {text}"):
            return tokens_of_file(folder, Path(text), sequences=sequences, length=length)
    with progress(stage) as on_progress:
        return tokens_of_model(
            load_writer(folder, length),
            sequences=sequences,
            length=length,
            seed=seed,
            on_token=lambda done, total: on_progress("the source writes, tokens", done, total),
        )


@contextmanager
def progress(title: str, *, silent: bool = False) -> Generator[Callable[[str, int, int], None]]:
    """A bar on a terminal that names stage and count: called with the stage, what is done of it, and of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, disable=silent or not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, total: bar.update(task, description=f"{title}: {what}", completed=done, total=total)


def run_facts(processes: int = 1) -> dict[str, Any]:
    """For the report: the command, the machine and versions it runs on, and in how many processes if in several."""
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from latentkv.bench.environment import describe_environment

    try:
        own = version("latentkv")
    except PackageNotFoundError:  # run from its source
        own = None
    environment = {"latentkv": own} | asdict(describe_environment(torch.get_num_threads()))
    if processes > 1:
        environment["processes"] = processes
    return {"command": shlex.join(["latentkv", *sys.argv[1:]]), "environment": environment}
