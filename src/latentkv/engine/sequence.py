"""`Sequence`: the tokens of a running request and the pages that hold their state."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from latentkv.engine.loading import Loading
from latentkv.state import KnownPage, PageKey


@dataclass(eq=False)
class Sequence:
    """Tokens on their way through the model.

    Attributes:
        index: of its request; smaller ones came earlier.
        tokens: the prompt and the tokens chosen since.
        pages: cache pages that the sequence holds, in order.
        num_cached: how many of the tokens the cache holds already.
        draft: tokens that may come next; they are read together with the newest one, and checked.
        salt: whose prefixes it shares; texts of different salts share nothing. None: it shares with nobody.
        known: its first pages that other sequences can find, as they find them.
        keys: of its first full pages, to find them in a store.
        num_offered: how many of the known pages the store was given to write.
        loading: pages after the known ones that are being read from the store; until then it takes part in no step.
        num_mtp_cached: the MTP module's cache holds the tokens before this one; 0 until it has read any.
        states: hidden states that the MTP module has not read yet, the first of the token before that one.
    """

    index: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list[int])
    num_cached: int = 0
    draft: list[int] = field(default_factory=list[int])
    salt: str | None = ""
    known: list[KnownPage] = field(default_factory=list[KnownPage])
    keys: list[PageKey] = field(default_factory=list[PageKey])
    num_offered: int = 0
    loading: Loading | None = None
    num_mtp_cached: int = 0
    states: list[Tensor] = field(default_factory=list[Tensor])

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
