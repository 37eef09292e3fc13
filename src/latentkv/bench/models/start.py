"""How long a start takes, to the first token: packing anew, and mapping what an earlier start packed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, cast

from latentkv.bench.environment import Environment, describe_environment
from latentkv.errors import RequestError

_PROMPT = ["--token-ids", "1 2 3"]  # which every model takes, with a tokenizer or without
_MAIN = "from latentkv.cli.app import main; main()"


@dataclass(frozen=True)
class Start:
    """One way to start, medians over its runs.

    Attributes:
        name: what was started.
        seconds: from the command to the first byte that it prints.
        cpu_seconds: of the whole process, on all cores.
    """

    name: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class StartReport:
    """Starts beside each other; the first is `import torch` alone."""

    model: str
    repeats: int
    starts: tuple[Start, ...]
    environment: Environment


def measure_start(
    options: Sequence[str], *, name: str, repeats: int, progress: Callable[[str], None] = lambda text: None
) -> StartReport:
    """Time starts in turn, `repeats` times each, after one of each that is not counted.

    Args:
        options: of `latentkv generate`, such as --model.
        name: of the model, for the report.
        repeats: runs of each.
        progress: called with what is going on.

    Raises:
        RequestError: a start fails; it says what the command said.
    """
    generate = [sys.executable, "-c", _MAIN, "generate", *_PROMPT, "--max-tokens", "1", *options]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="latentkv-start-") as folder:
        ways = {
            "import torch": [sys.executable, "-c", "import torch; print(1)"],
            "packed anew": [*generate, "--no-packed-dir"],
            "mapped": [*generate, "--packed-dir", folder],
        }
        for way in ways.values():
            _run(way)
        for repeat in range(repeats):
            progress(f"round {repeat + 1} of {repeats}")
            for way, command in ways.items():
                found.setdefault(way, []).append(_run(command))
    starts = tuple(
        Start(way, statistics.median(wall for wall, _ in runs), statistics.median(cpu for _, cpu in runs))
        for way, runs in found.items()
    )
    return StartReport(name, repeats, starts, describe_environment(os.cpu_count() or 1))


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds to the first byte of output, and of the process on all cores."""
    before, started = os.times(), time.perf_counter()
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
            output = cast("IO[bytes]", process.stdout)
            output.read(1)
            seconds = time.perf_counter() - started
            output.read()
        if process.returncode:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().removeprefix("error: ")
            raise RequestError(words or f"`latentkv generate` ended with exit code {process.returncode}.")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used
