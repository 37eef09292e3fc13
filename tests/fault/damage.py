"""Damage for files, drawn from a `random.Random`: what hostile, torn and mistaken files look like."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "[" * 40 + "]" * 40
VALUES: list[Any] = [
    *(None, True, False, "", "2", "x", "false", -1, 0, 1, 2, 2.5, -0.0, 1e-320, 1e308, -1e308),
    *(2**31 - 1, 2**31, 2**63, 10**12, 10**30, [], {}, [[]], [None], ["x"], [1, [2, [3]]], {"a": {"b": [1]}}),
    json.loads(DEEP),
]
TEXTS = [
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 400,
    b'"\\ud800"',
    b"\xff",
    b"",
    b"{",
    b"null",
]


def wrong_value(random: Random) -> Any:
    return copy.deepcopy(random.choice(VALUES))


def damaged_object(random: Random, value: Any) -> Any:
    """A copy of a JSON value with one of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    paths = list(_places(value))
    if not paths:
        return wrong_value(random)
    # Whole branches as often as leaves, of which large tables have most.
    depth = random.randint(1, max(map(len, paths)))
    path = random.choice([path for path in paths if len(path) <= depth])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    act = random.random()
    if act < 0.75:
        holder[path[-1]] = wrong_value(random)
    elif act < 0.9 or isinstance(holder, list):
        del holder[path[-1]]
    else:
        holder[str(path[-1]) + random.choice(("x", "_token", "_config"))] = holder.pop(path[-1])
    return value


def damaged_json(random: Random, value: Any) -> bytes:
    """The text of a damaged value, or a damaged text."""
    if random.random() < 0.8:
        return json.dumps(damaged_object(random, value)).encode()
    text = json.dumps(value).encode()
    if random.random() < 0.5:
        return damaged_bytes(random, text)
    key = random.choice(list(value)) if isinstance(value, dict) and value else "x"
    return b'{"' + str(key).encode() + b'":' + random.choice(TEXTS) + b"," + text[1:]


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """Bytes that are cut short, changed, doubled, blanked or replaced by another file's."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 64)))
    return random.choice(
        (
            data[:at],
            data[:at] + bytes(random.randrange(256) for _ in range(end - at)) + data[end:],
            data[:at] + bytes(end - at) + data[end:],
            data[:at] + b"\xff" * (end - at) + data[end:],
            data[:end] + data[at:],
            data[:at] + data[end:],
            data + bytes(random.randrange(1, 64)),
            random.choice(TEXTS),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        )
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))
