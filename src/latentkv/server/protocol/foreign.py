"""What clients send that is no parameter of ours, or no value of one: what becomes of it, said once, as data.

A value that asks for what happens anyway, or that only tags, routes or bills a request, passes. One that means a
parameter of ours becomes that. Any other would change the answer, or promise what does not hold: it is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from latentkv.server.errors import ApiError


@dataclass(frozen=True)
class Tag:
    """A parameter that changes no answer: each value of these types passes."""

    types: tuple[type, ...] = (str,)


@dataclass(frozen=True)
class Only:
    """A parameter of which these values are what happens anyway; `instead` says what to do about the others."""

    values: tuple[Any, ...]
    instead: str = "leave it out"


@dataclass(frozen=True)
class Means:
    """A parameter that is ours under another name, its value turned by `convert`, which raises ValueError in words."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Turned:
    """A parameter of ours with values that are written otherwise elsewhere: (theirs, ours); None: as if left out."""

    pairs: tuple[tuple[Any, Any], ...]


Rule = Tag | Only | Means | Turned
Rules = Mapping[str, Rule]


def translate(given: Mapping[str, Any], known: Collection[str], rules: Rules) -> dict[str, Any]:
    """What was given, in our own words; what nobody knows is left as it is, for the model of the request to refuse.

    Args:
        given: a part of a request; what is null counts as left out.
        known: the names of our own parameters.
        rules: for the names, and values of ours, that are foreign.

    Raises:
        ApiError: a foreign value cannot be honoured, or says otherwise than our own parameter beside it.
    """
    ours: dict[str, Any] = {}
    meant: dict[str, tuple[str, Any]] = {}
    for name, value in given.items():
        if value is None:
            continue
        match rules.get(name):
            case None:
                if name in known or not _is_empty(value):
                    ours[name] = _integral(value)
            case Tag(types):
                if not isinstance(value, types):
                    raise _refused(name, value, f"it is a tag, and must be {_names(types)}")
            case Only(values, instead):
                if not _among(value, values):
                    raise _refused(name, value, instead)
            case Turned(pairs):
                own = next((own for foreign, own in pairs if _same(value, foreign)), value)
                if own is not None:
                    ours[name] = _integral(own)
            case Means(own_name, convert):
                try:
                    meant[name] = own_name, convert(_integral(value))
                except ValueError as error:
                    raise _refused(name, value, str(error)) from None
    for name, (own_name, value) in meant.items():
        if own_name in ours and not _same(ours[own_name], value):
            raise ApiError(400, f"{name} and {own_name} say different things: give one of them.", param=name)
        if value is not None:
            ours[own_name] = value
    return ours


def _is_empty(value: object) -> bool:
    """Whether a parameter that nobody knows asks for nothing."""
    return isinstance(value, (str, list, dict)) and not value


def _integral(value: object) -> object:
    """JSON has one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same(one: object, other: object) -> bool:
    """Equal, and neither is a truth value where the other is a number."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _among(value: object, values: tuple[Any, ...]) -> bool:
    return any(_same(value, each) for each in values)


def _names(types: tuple[type, ...]) -> str:
    words = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
    return " or ".join(words[each] for each in types)


def _refused(name: str, value: object, remedy: str) -> ApiError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:60]} ..."
    return ApiError(400, f"{name}={shown} is not possible here: {remedy}.", param=name)
