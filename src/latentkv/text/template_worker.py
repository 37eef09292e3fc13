"""Runs chat templates, which are programs of strangers, in a process of its own that its limits may end at any time.

Run as a file, it knows only jinja2. Its arguments are the limits on memory in bytes, on processor time in seconds and
on what is written in characters, then where packages are found. It answers the one who holds the other end of its
stdin: a frame is 8 bytes of length and so many bytes. A task is JSON: {"source": of a template, "variables": to write
it with, or null to be told by 1 or 0 whether it reads `tools`}. An answer is two letters and a text: + (it went well),
- (the template is wrong) or ! (it takes too much), and . or ! (this process ends now, and another takes its place).
"""

import json
import os
import resource
import select
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

MAX_COMPILED = 16
MAX_ERROR = 500  # characters
PARENT_SECONDS = 2.0  # after which the process looks whether its parent still lives, in case its end was not seen

if __name__ == "__main__":
    sys.path += sys.argv[4:]

import jinja2  # noqa: E402 (found only now)
from jinja2 import meta, nodes  # noqa: E402
from jinja2.ext import Extension  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


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


def _answer(templates: _Templates, task: bytes, memory: int) -> tuple[bytes, str]:
    """(how it went, the text)."""
    try:
        asked = json.loads(task.decode(errors="surrogatepass"))
        if asked["variables"] is None:
            return b"+.", str(int(_reads_tools(asked["source"])))
        return b"+.", templates.write(asked["source"], asked["variables"])
    except _Failed as error:
        return b"-.", str(error)
    except MemoryError:
        return b"!!", f"The chat template takes more than {memory >> 20} MiB of memory."


def _receive(count: int, parent: int) -> bytes:
    """So many bytes of stdin; ends the process when there is nobody to send them."""
    parts: list[bytes] = []
    while count:
        while not select.select([0], [], [], PARENT_SECONDS)[0]:
            if os.getppid() != parent:
                sys.exit()
        part = os.read(0, min(count, 1 << 20))
        if not part:
            sys.exit()
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(how: bytes, text: str) -> None:
    content = text.encode(errors="surrogatepass")
    left = memoryview((2 + len(content)).to_bytes(8, "little") + how + content)
    while left:
        left = left[os.write(0, left) :]


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Take tasks until there is nobody to send any."""
    parent, memory, seconds = os.getppid(), int(sys.argv[1]), float(sys.argv[2])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, memory)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who is served
    templates = _Templates(int(sys.argv[3]))
    while True:
        task = _receive(int.from_bytes(_receive(8, parent), "little"), parent)
        # Its signal is nobody's to catch: it ends the process, wherever in which library the time is spent.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        how, text = _answer(templates, task, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(how, text)
        if how.endswith(b"!"):
            return


if __name__ == "__main__":
    main()
