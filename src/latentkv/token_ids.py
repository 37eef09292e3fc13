"""Token ids that somebody wrote down, in a file or a request: checked before any of them becomes an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from latentkv.errors import LatentKVError

NO_TOKEN = -1
"""How some files write that there is no such token."""


def read_token_id(value: Any, name: str, error: type[LatentKVError], *, vocab_size: int | None = None) -> int | None:
    """One token id of a file; None for null and -1, which both say that there is none.

    Args:
        value: what the file holds.
        name: the file and the key, to begin the sentence with.
        error: the type that is raised.
        vocab_size: of the model; None where it does not matter, as for padding, which is never looked up.

    Raises:
        LatentKVError: of type `error`: the value is no whole number, or outside the vocabulary.
    """
    if value is None:
        return None
    if type(value) is not int:
        raise error(f"{name} must be a token id, a whole number, not {_shown(value)}.")
    if value == NO_TOKEN:
        return None
    if value < 0 or (vocab_size is not None and value >= vocab_size):
        highest = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise error(f"{name} names the token {value}, outside the vocabulary of 0{highest}: correct the file.")
    return value


def read_token_ids(
    value: Any, name: str, error: type[LatentKVError], *, vocab_size: int | None = None
) -> tuple[int, ...]:
    """The token ids of a file that holds one, a list of them, or none; each as in `read_token_id`.

    Raises:
        LatentKVError: of type `error`, as `read_token_id`.
    """
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if isinstance(value, list) and None in values:
        raise error(f"{name} must hold token ids, whole numbers, not null.")
    read = [read_token_id(item, name, error, vocab_size=vocab_size) for item in values]
    return tuple(dict.fromkeys(token for token in read if token is not None))


def require_token_ids(tokens: Iterable[object], name: str, error: type[LatentKVError], *, vocab_size: int) -> None:
    """Checks the token ids of a request.

    Raises:
        LatentKVError: of type `error`: one is no whole number from 0 to vocab_size - 1.
    """
    for token in tokens:
        if type(token) is not int:
            raise error(f"{name} must hold token ids, whole numbers, not {_shown(token)}.")
        if not 0 <= token < vocab_size:
            raise error(f"{name} names token {token}, outside the vocabulary of 0 to {vocab_size - 1}.")


def _shown(value: object) -> str:
    """A value as JSON's readers know it, cut short."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
