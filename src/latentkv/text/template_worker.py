"""Renders chat templates, which are programs of strangers, for `limited_worker.py`.

A task is JSON: {"source": of a template, "variables": to write it with, or null to be told by 1 or 0 whether it reads
`tools`}. The answer is a text.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_COMPILED = 16
MAX_ERROR = 500  # characters


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja's escaping for HTML, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)  # pyright: ignore[reportArgumentType]
    return environment


_ENVIRONMENT = _environment()


class _Failed(Exception):
    """A template cannot be read, or fails; says so in a sentence."""


class _Templates:
    """Templates by their sources, compiled once; they may write so many characters."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._compiled: dict[str, jinja2.Template] = {}

    def write(self, source: str, variables: dict[str, Any]) -> str:
        """What a template writes."""
        template = self._compiled.get(source)
        if template is None:
            template = _reading(lambda: _ENVIRONMENT.from_string(source))
            if len(self._compiled) == MAX_COMPILED:
                self._compiled.clear()
            self._compiled[source] = template
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(variables):
                size += len(part)
                if size > self._most:
                    raise _Failed(f"The chat template wrote more than {self._most} characters.")
                parts.append(part)
        except (_Failed, MemoryError):
            raise
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise _Failed(f"The chat template failed: {_first_line(error)}.") from error
        return "".join(parts)


def _reading(read: Any) -> Any:
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # jinja2 raises what Python raises for code that it made: RecursionError, SyntaxError
        raise _Failed(f"The chat template cannot be read: {_first_line(error)}.") from error


def _reads_tools(source: str) -> bool:
    try:
        return "tools" in _reading(lambda: meta.find_undeclared_variables(_ENVIRONMENT.parse(source)))
    except _Failed:
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:MAX_ERROR].rstrip(".")


def _answer(templates: _Templates, task: bytes) -> tuple[bytes, str]:
    """(how it went, the text)."""
    try:
        asked = json.loads(task.decode(errors="surrogatepass"))
        if asked["variables"] is None:
            return b"+", str(int(_reads_tools(asked["source"])))
        return b"+", templates.write(asked["source"], asked["variables"])
    except _Failed as error:
        return b"-", str(error)
    except MemoryError:
        return b"!", ""


def start(most: str) -> Callable[[bytes], tuple[bytes, bytes]]:
    """The function that does a task; a template may write `most` characters."""
    templates = _Templates(int(most))

    def do(task: bytes) -> tuple[bytes, bytes]:
        how, text = _answer(templates, task)
        return how, text.encode(errors="surrogatepass")

    return do
