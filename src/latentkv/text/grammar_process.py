"""`GrammarProcesses`: grammars of strangers are tried in processes with limits on time, memory and stack."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from latentkv.errors import RequestError
from latentkv.limited_process import LimitedProcesses, LimitError, Task

COMPILE_SECONDS = 1.0
"""Processor time that compiling may take."""

WAIT_SECONDS = 10.0
"""Time until a compilation is given up, on a machine that is busy otherwise."""

COMPILE_MEMORY = 512 << 20
"""Bytes of address space that compiling may take, those of an empty process included."""

COMPILE_STACK = 1 << 20
"""Bytes of stack that compiling may take; threads have 2 MiB or more."""

# llguidance's own words for "so much work, and no more": about 20 ms a token, and 15 MB of states a grammar.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}

_WORKER = Path(__file__).with_name("grammar_worker.py")


class GrammarProcesses(LimitedProcesses):
    """Processes that compile grammars; use them from any thread."""

    def __init__(self) -> None:
        super().__init__(
            _WORKER,
            ["llguidance"],
            memory=COMPILE_MEMORY,
            arguments=[json.dumps(PARSER_LIMITS), str(COMPILE_STACK)],
            apart=True,  # what a grammar takes is seen where none was compiled before
        )

    def try_out(self, grammar: str, name: str, vocab_size: int) -> tuple[str, int]:
        """Compile a grammar for a vocabulary of single bytes.

        Args:
            grammar: in llguidance's own language.
            name: what the error calls it.
            vocab_size: tokens that it may ask for by their numbers.

        Returns:
            (what llguidance finds wrong with it, or ""; bytes that it takes).

        Raises:
            RequestError: it is too much work.
        """
        task = json.dumps({"grammar": grammar, "vocab_size": vocab_size}).encode()
        try:
            result = json.loads(self.ask(Task(task, COMPILE_SECONDS, WAIT_SECONDS)))
        except LimitError as over:
            raise RequestError(_over(over, name)) from None
        except OSError as error:
            raise RequestError(f"The {name} cannot be compiled now ({error}): try again.") from error
        return result["error"], result["bytes"]


@cache
def grammar_processes() -> GrammarProcesses:
    """Those of this process: all models share them, as of a tokenizer they know nothing."""
    return GrammarProcesses()


def _over(over: LimitError, name: str) -> str:
    match over.limit:
        case "time":
            return f"The {name} takes more than {COMPILE_SECONDS:g} s to compile: simplify it."
        case "memory" | "end":
            return f"The {name} is too large or nests too deeply to compile: simplify it."
        case "wait":
            return f"The {name} was not compiled within {WAIT_SECONDS:g} s: simplify it, or try again."
