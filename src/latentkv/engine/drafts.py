"""What may come next, guessed cheaply: the model checks a guess of several tokens in one step."""

from __future__ import annotations

from typing import Protocol

from latentkv.engine.sequence import Sequence


class Drafter(Protocol):
    """Proposes the tokens that may follow a sequence's newest one."""

    def propose(self, sequence: Sequence) -> list[int]:
        """Tokens inside the vocabulary, the next one first; empty where there is nothing to go by."""
        ...


class NGramDrafter:
    """What followed the newest tokens when the text last had them (prompt look-up).

    It costs no model, and pays where answers repeat their prompt: edits, summaries, code, quotations.

    Args:
        most: tokens of a draft.
        longest: so many of the newest tokens are looked for, then fewer.
        shortest: fewer say too little.
        window: tokens that are searched, the newest: the search takes longer with each.
    """

    def __init__(self, most: int = 4, *, longest: int = 4, shortest: int = 2, window: int = 8192) -> None:
        self._most = most
        self._sizes = range(longest, shortest - 1, -1)
        self._window = window

    def propose(self, sequence: Sequence) -> list[int]:
        """The tokens after the last place where the text already had its newest ones."""
        # One character a token: `str.rfind` looks through thousands of them in microseconds.
        text = "".join(map(chr, sequence.tokens[-self._window :]))
        for size in self._sizes:
            found = text.rfind(text[-size:], 0, -1) if size < len(text) else -1
            if found >= 0:
                return [ord(token) for token in text[found + size : found + size + self._most]]
        return []
