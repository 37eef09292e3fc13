"""`TemplateProcesses`: chat templates are rendered in processes that may take so much time and memory, and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latentkv.errors import TemplateLimitError, TokenizerError
from latentkv.limited_process import MAX_PROCESSES, LimitedProcesses, LimitError, RefusedError, Task

RENDER_SECONDS = 0.4
"""Processor time that a template may take, to be read and to write one conversation."""

RENDER_MEMORY = 192 << 20
"""Bytes of address space of its process, those of an empty one (about 30 MiB) included."""

WAIT_SECONDS = 10.0
"""Time until it is given up, on a machine that is busy otherwise."""

MAX_CHARACTERS = 1 << 24
"""Of a rendered conversation."""

_JSON = json.JSONEncoder(ensure_ascii=False)
_WORKER = Path(__file__).with_name("template_worker.py")
_PACKAGES = ("jinja2", "markupsafe")


class TemplateProcesses(LimitedProcesses):
    """Processes that render chat templates; use them from any thread.

    Args:
        most: processes at once; further templates wait.
    """

    def __init__(self, most: int = MAX_PROCESSES) -> None:
        super().__init__(_WORKER, _PACKAGES, memory=RENDER_MEMORY, arguments=[str(MAX_CHARACTERS)], most=most)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """What a template writes.

        Args:
            source: of jinja2.
            variables: JSON values.

        Raises:
            TokenizerError: it cannot be read, or fails.
            TemplateLimitError: it takes more than it may.
        """
        return self._do({"source": source, "variables": variables})

    def reads_tools(self, source: str) -> bool:
        """Whether a template does anything with `tools`; raises as `render`."""
        return self._do({"source": source, "variables": None}) == "1"

    def _do(self, task: Mapping[str, Any]) -> str:
        try:
            # Piece by piece, in Python: all at once, in C, nobody else runs until the last of its values is written.
            frame = "".join(_JSON.iterencode(task)).encode(errors="surrogatepass")
        except ValueError as error:  # an integer of thousands of digits
            raise TokenizerError(f"The chat template cannot be given what is no JSON: {error}.") from None
        try:
            answer = self.ask(Task(frame, RENDER_SECONDS, WAIT_SECONDS))
        except RefusedError as refused:
            raise TokenizerError(str(refused)) from None
        except LimitError as over:
            raise TemplateLimitError(_over(over)) from None
        except OSError as error:
            raise TokenizerError(f"The chat template cannot be run now ({error}): try again.") from error
        return answer.decode("utf-8", "surrogatepass")


@cache
def template_processes() -> TemplateProcesses:
    """Those of this process: all templates share them, as each call is held to the limits by itself."""
    return TemplateProcesses()


def _over(over: LimitError) -> str:
    memory = f"takes more than {RENDER_MEMORY >> 20} MiB"
    match over.limit:
        case "time":
            return f"The chat template takes more than {RENDER_SECONDS:g} s: shorten the conversation, or change it."
        case "memory":
            return f"The chat template {memory} of memory."
        case "end":
            return f"The chat template was stopped: it nests too deeply, or {memory}."
        case "wait":
            waited = f"The chat template wrote nothing within {WAIT_SECONDS:g} s"
            return f"{waited}: try again, or shorten the conversation."
