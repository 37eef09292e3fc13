"""What an interrupted run left behind, looked at before it is gone on with: a damaged file is one sentence."""

from __future__ import annotations

import types
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from safetensors import SafetensorError

from latentkv.errors import LatentKVError

Saved = TypeVar("Saved")


@contextmanager
def saved_in(path: Path, error: type[LatentKVError], remedy: str) -> Generator[None]:
    """Turn whatever goes wrong with values read from a file into one sentence.

    Args:
        path: of the file or folder that they are from.
        error: the type that is raised.
        remedy: what to do about it, to end the sentence with.

    Raises:
        LatentKVError: of type `error`, naming the path; an error that is a sentence already passes.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as problem:
        reason = f"it lacks {problem}" if isinstance(problem, KeyError) else str(problem).partition("\n")[0]
        raise error(f"{path} is damaged ({reason[:200]}): {remedy}.") from problem


def as_saved(kind: type[Saved], values: object) -> Saved:
    """A dataclass or typed dictionary of the values that JSON had; lists become tuples where those are meant.

    Raises:
        ValueError: a field is missing, unknown, or of another type, named.
    """
    return cast("Saved", _read(values, kind, kind.__name__.lstrip("_")))


def _read(value: Any, hint: Any, name: str) -> Any:
    """`value`, if it is what `hint` says."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) or is_typeddict(hint):
        return _read_fields(value, cast("type", hint), name)
    if origin in (Union, types.UnionType):
        return value if value is None and type(None) in inner else _read(value, inner[0], name)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is no list")
        items = cast("Sequence[Any]", value)
        each = list(inner) if origin is tuple and inner[-1] is not ... else [inner[0]] * len(items)
        if len(each) != len(items):
            raise ValueError(f"{name} has {len(items)} values, not {len(each)}")
        read = [_read(item, one, name) for item, one in zip(items, each, strict=True)]
        return tuple(read) if origin is tuple else read
    if hint is float and type(value) is int:
        return value
    if origin is dict:
        hint = dict
    if origin is Literal and value not in inner:
        raise ValueError(f"{name} is none of {', '.join(map(repr, inner))}")
    plain = hint if isinstance(hint, type) else str  # a Literal is one of some texts
    if type(value) is not plain:
        raise ValueError(f"{name} is no {plain.__name__}")
    return value


def _read_fields(value: Any, kind: type, name: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    fields = cast("dict[str, Any]", value)
    if wrong := sorted(hints.keys() ^ fields.keys()):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in hints else 'not known'}")
    return kind(**{key: _read(fields[key], hint, key) for key, hint in hints.items()})
