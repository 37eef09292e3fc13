"""Where chat templates run: they are programs of strangers, and may neither reach out nor go on for ever."""

import json
import time
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24  # of a rendered conversation, and of any string or list that a template multiplies up
MAX_SECONDS = 10.0  # that a template may take

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def time_limit() -> Generator[None]:
    """What is rendered inside of it, in this thread, stops with a `SecurityError` when it takes too long."""
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


class _Watched(Iterable[Any]):
    """What a loop goes through; each turn looks at the clock."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            if time.monotonic() > _deadline.get():
                raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
            yield item

    def __len__(self) -> int:
        if not isinstance(self._items, Sized):
            raise TypeError("unknown length")
        return len(self._items)


class _Rewriting(NodeTransformer):
    """Makes loops look at the clock, and `~` at the size of what it makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A loop."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "watched")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b`."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenated")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _concatenated(items: Sequence[Any]) -> str:
    texts = [str(item) for item in items]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise SecurityError("a text is too long")
    return "".join(texts)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which moreover refuses to multiply things up to sizes that exhaust memory."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Rewriting().visit(super()._parse(source, name, filename)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not available in chat templates")
        if operator == "+":
            size = _size(left) + _size(right)
        else:
            size = max(_size(left) * _count(right), _count(left) * _size(right))
        if size > MAX_CHARACTERS:
            raise SecurityError("a sum or a repetition is too long")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return len(cast(Sequence[Any], value)) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja's escaping for HTML, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters.update(tojson=_tojson, watched=_Watched, concatenated=_concatenated)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)  # pyright: ignore[reportArgumentType]
    return environment


ENVIRONMENT = _environment()
