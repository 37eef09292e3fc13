"""`Sequence`: the tokens of a running request, and where their state lies."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentkv.state import Slot


@dataclass(eq=False)
class Sequence:
    """Tokens on their way through the model.

    What the scheduler, the store and drafters know of a sequence beyond that, they keep themselves.

    Attributes:
        index: of its request; smaller ones came earlier.
        tokens: the prompt and the tokens chosen since.
        pages: cache pages that the sequence holds, in order.
        slot: where the recurrent state of its tokens lies, where a layer is recurrent.
        num_cached: how many of the tokens the cache holds already, or will when the steps under way are done.
        num_found: how many of the prompt's tokens the cache or the store had when it was first taken in.
        draft: tokens that may come next; they are read together with the newest one, and checked.
        times_given_back: how often it has given its pages back, to be read again: what was under way then is void.
    """

    index: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list[int])
    slot: Slot | None = None
    num_cached: int = 0
    num_found: int = 0
    draft: list[int] = field(default_factory=list[int])
    times_given_back: int = 0

    @property
    def num_uncached(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.tokens) - self.num_cached

    @property
    def decodes(self) -> bool:
        """Whether only the newest token is unread."""
        return self.num_uncached == 1

    def unread(self, count: int) -> list[int]:
        """The next `count` tokens to read, the draft behind them."""
        own = self.tokens[self.num_cached : self.num_cached + count]
        return own + self.draft[: count - len(own)]
