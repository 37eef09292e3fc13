"""JSON that strangers may have written: whatever is wrong with it becomes one sentence, never a traceback."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from latentkv.errors import LatentKVError
from latentkv.files import read_bytes

SETTINGS_BYTES = 16 << 20
"""Size limit of a file of settings, in bytes: fifteen times the largest known."""

INDEX_BYTES = 256 << 20
"""Size limit of a file that names every tensor of a checkpoint, in bytes."""

MAX_DEPTH = 64
"""Objects and lists inside one another; no file that is meant has more than a dozen."""

MAX_DIGITS = 64
"""Digits of a whole number: 10^30 is a common `model_max_length`, and the largest float has 309."""

_LFS_POINTER = b"version https://git-lfs"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """What JSON allows and no file here may hold."""


def read_json(
    path: Path, error: type[LatentKVError], *, most_bytes: int = SETTINGS_BYTES, remedy: str = "fetch the file again"
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: of the file.
        error: the type that is raised.
        most_bytes: size limit, looked at before anything is read.
        remedy: what to do about a file that is damaged, to end the sentence with.

    Raises:
        LatentKVError: of type `error`, see `read_any_json`; or the file holds something else than an object.
    """
    value = read_any_json(path, error, most_bytes=most_bytes, remedy=remedy)
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object but {_KINDS[type(value)]}: {remedy}.")
    return cast("dict[str, Any]", value)


def read_any_json(
    path: Path, error: type[LatentKVError], *, most_bytes: int = SETTINGS_BYTES, remedy: str = "fetch the file again"
) -> Any:
    """The JSON value that a file holds, whatever its type; see `read_json`.

    Raises:
        LatentKVError: of type `error`: the file is missing, no regular file, too large, or not what `parse_json` takes.
    """
    content = read_bytes(path, error, most_bytes)
    if content.startswith(_LFS_POINTER):
        raise error(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    return parse_json(content, str(path), error, remedy=remedy)


def parse_json(
    text: bytes | str, name: str, error: type[LatentKVError], *, remedy: str = "fetch the file again"
) -> Any:
    """The value that a JSON text stands for.

    Refused, besides what is not JSON: bytes that are not UTF-8, a key that comes twice in one object, NaN and
    infinities (also as 1e999), whole numbers of more than `MAX_DIGITS` digits, halves of surrogate pairs, and more than
    `MAX_DEPTH` objects and lists inside one another.

    Args:
        text: UTF-8.
        name: where it comes from, to begin the sentence with.
        error: the type that is raised.
        remedy: what to do about it, to end the sentence with.

    Raises:
        LatentKVError: of type `error`.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=_refuse_constant,
        )
        _require_shallow(value)
        if _SURROGATE.search(decoded):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{name} is not valid JSON (it nests too deeply): {remedy}.") from None
    except UnicodeEncodeError:
        raise error(f"{name} is not valid JSON (half of a surrogate pair is no character): {remedy}.") from None
    except UnicodeDecodeError as reason:
        raise error(f"{name} is not valid JSON (no UTF-8 at byte {reason.start}): {remedy}.") from None
    except ValueError as reason:
        raise error(f"{name} is not valid JSON ({reason}): {remedy}.") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _RefusedError(f"the key {twice[:80]!r} comes twice in one object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _RefusedError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {digits[:80]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is no JSON number")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer if type(outer) is list else ())
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise RecursionError


_KINDS: dict[type, str] = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@contextmanager
def taken_from(path: Path, error: type[LatentKVError], *, remedy: str = "fetch the file again") -> Generator[None]:
    """Has a key that is missing from a file's values, or one of the wrong kind, become one sentence.

    Args:
        path: of the file that the values inside come from.
        error: the type that is raised.
        remedy: what to do about it, to end the sentence with.

    Raises:
        LatentKVError: of type `error`.
    """
    try:
        yield
    except KeyError as reason:
        raise error(f"{path} lacks {reason}: {remedy}.") from reason
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError) as reason:
        said = " ".join(str(reason).split())[:200]
        raise error(f"{path} holds a value of the wrong kind ({said}): {remedy}.") from reason
