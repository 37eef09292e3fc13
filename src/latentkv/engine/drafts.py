"""What may come next, guessed cheaply: the model checks a guess of several tokens in one step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from latentkv.engine.sequence import Sequence

Choose = Callable[[list[int], Tensor], int]
"""(tokens drafted so far, logits [V] of what follows them) -> the token that the request would take: its own sampling
parameters, and the noise of that position, so that a draft is right as often as can be."""


@dataclass
class Wish:
    """What a step leaves a drafter with, for one sequence.

    Attributes:
        sequence: that took part in the step; its newest token is not read yet.
        hidden: [n, D] final hidden states of the n tokens that the step has read, the last of those that are cached.
        most: tokens wanted; 0: none. There are pages for them.
        choose: picks a token.
        drafted: tokens of the draft that the step has checked.
        accepted: those that were right.
    """

    sequence: Sequence
    hidden: Tensor
    most: int
    choose: Choose
    drafted: int = 0
    accepted: int = 0

    @property
    def decoded(self) -> bool:
        """Whether the step has read one token and a draft, and no more."""
        return len(self.hidden) == 1 + self.accepted


class Drafter(Protocol):
    """Proposes the tokens that may follow the newest ones of sequences."""

    def propose(self, wishes: SequenceOf[Wish], seconds: float) -> list[list[int]]:
        """Called after every step.

        Args:
            wishes: of all sequences that took part.
            seconds: that reading, and choosing the tokens, has taken.

        Returns:
            For each at most `most` tokens inside the vocabulary, the next one first; none where nothing speaks for any.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Called when a sequence gives its pages back, and with them what the drafter has cached there."""
        ...


class NGramDrafter:
    """What followed the newest tokens when the text last had them (prompt look-up).

    It costs no model, and pays where answers repeat their prompt: edits, summaries, code, quotations.

    Args:
        longest: so many of the newest tokens are looked for, then fewer.
        shortest: fewer say too little.
        window: tokens that are searched, the newest: the search takes longer with each.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2, window: int = 8192) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._window = window

    def propose(self, wishes: SequenceOf[Wish], seconds: float) -> list[list[int]]:
        """See `Drafter`."""
        return [self._continued(wish.sequence.tokens, wish.most) if wish.most else [] for wish in wishes]

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`; there is nothing to forget."""

    def _continued(self, tokens: list[int], most: int) -> list[int]:
        """The tokens after the last place where the text already had its newest ones."""
        # One character a token: `str.rfind` looks through thousands of them in microseconds.
        text = "".join(map(chr, tokens[-self._window :]))
        for size in self._sizes:
            found = text.rfind(text[-size:], 0, -1) if size < len(text) else -1
            if found >= 0:
                return [ord(token) for token in text[found + size : found + size + most]]
        return []
