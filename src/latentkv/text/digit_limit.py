"""`DigitLimit`: numbers in JSON end, even where a schema would let them grow for ever.

A model that is held to a form it does not know may write digits until it has no tokens left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_DIGITS = 20
"""In a row: 64-bit integers have 19, and a double needs 17."""

_DIGITS = frozenset(b"0123456789")
_QUOTE, _ESCAPE = b'"\\'


@dataclass
class NumberState:
    """Where a JSON text stands.

    Attributes:
        digits: in a row, at its end.
        quoted: whether it ends inside of a string.
        escaped: whether that string ends with a backslash.
    """

    digits: int = 0
    quoted: bool = False
    escaped: bool = False


class DigitLimit:
    """Knows the digits of a vocabulary.

    Args:
        tokens: bytes of each.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._goes_on = np.array([token[:1].isdigit() for token in tokens], dtype=np.bool_)

    def follow(self, state: NumberState, token_id: int) -> None:
        """Take the next token."""
        for byte in self._tokens[token_id]:
            if state.quoted:
                state.quoted = state.escaped or byte != _QUOTE
                state.escaped = byte == _ESCAPE and not state.escaped
            else:
                state.quoted = byte == _QUOTE
                state.digits = state.digits + 1 if byte in _DIGITS else 0

    def within(self, state: NumberState, allowed: NDArray[np.bool_], *, may_end: bool) -> NDArray[np.bool_]:
        """Of the tokens [V] that a form allows, those that end a number which is long enough, if it may end."""
        if state.quoted or state.digits < MAX_DIGITS:
            return allowed
        others = allowed & ~self._goes_on
        return others if may_end or others.any() else allowed
