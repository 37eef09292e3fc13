"""Which modules the regular expressions of a checkpoint's config fit, found in a process with a limit on time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from latentkv.errors import CheckpointError
from latentkv.limited_process import LimitedProcesses, LimitError, RefusedError, Task

MATCH_SECONDS, MATCH_SECONDS_PER_NAME = 1.0, 2e-5
"""Processor time of all patterns and names together; what is honest takes a tenth of it."""

MATCH_MEMORY = 256 << 20
"""Bytes of address space of the process, those of an empty one (about 30 MiB) included."""

MAX_PATTERN = 1000
"""Characters of a pattern."""

MAX_PATTERNS = 1000
"""Patterns of one config; published ones have up to a few dozen."""

WAIT_SECONDS = 20.0
"""Time until a pattern is given up, on a machine that is busy otherwise."""

_WORKER = Path(__file__).with_name("pattern_worker.py")


def match_patterns(patterns: Collection[str], names: Sequence[str], where: str) -> Mapping[str, frozenset[str]]:
    """The names whose beginning each pattern fits, as `re.match` tells.

    Args:
        patterns: regular expressions; where there are none, no process is started.
        names: of modules.
        where: the key that holds the patterns, to begin a sentence with.

    Raises:
        CheckpointError: one is no regular expression, they take too long, or are too many.
    """
    if not patterns or not names:
        return dict.fromkeys(patterns, frozenset[str]())
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{where} has {len(patterns)} patterns: list the modules by their names")
    left = MATCH_SECONDS + MATCH_SECONDS_PER_NAME * len(names)
    first = Task(json.dumps(list(names)).encode(), left, WAIT_SECONDS)
    with closing(LimitedProcesses(_WORKER, (), memory=MATCH_MEMORY, first=first)) as processes:
        fits: dict[str, frozenset[str]] = {}
        for pattern in patterns:
            found, took = _match(processes, pattern, left, where)
            fits[pattern] = frozenset([names[place] for place in found])
            left -= took
    return fits


def _match(processes: LimitedProcesses, pattern: str, seconds: float, where: str) -> tuple[list[int], float]:
    """(places of the names that a pattern fits, processor time that this took)."""
    if len(pattern) > MAX_PATTERN:
        raise CheckpointError(
            f"{where} has a pattern of {len(pattern)} characters, {pattern!r:.60}: list the modules by their names"
        )
    try:
        if seconds <= 0:
            raise LimitError("time")
        answer = json.loads(processes.ask(Task(pattern.encode(errors="surrogatepass"), seconds, WAIT_SECONDS)))
    except RefusedError as refused:
        raise CheckpointError(f"{where} has {pattern!r:.100}, which is no regular expression: {refused}") from None
    except LimitError as over:
        much = "time" if over.limit in ("time", "wait") else "memory"
        raise CheckpointError(
            f"{where} has the pattern {pattern!r:.100}, which takes too much {much} for the names of this checkpoint's "
            "modules: write it without repetition inside of repetition, or list the modules by name"
        ) from None
    except OSError as error:
        raise CheckpointError(f"no process can be started for the patterns of {where} ({error}): try again") from error
    return answer["fits"], answer["seconds"]
