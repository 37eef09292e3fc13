"""`PageKey`: what a stored page holds, said so that nothing else can be taken for it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class PageKey:
    """A full page of a text, or the snapshot of recurrent states at the end of one.

    Attributes:
        parent: digest of the page before it; of a text's first page the root, which stands for model, format and salt.
        tokens: the page's own token ids, 4 bytes each, little endian; of a snapshot a number below 0 (`snapshot`).
        depth: how many pages come before it.
        digest: SHA-256 of `parent` and `tokens`, and so of all that the page's numbers depend on.
    """

    parent: bytes
    tokens: bytes
    depth: int
    digest: bytes

    @classmethod
    def first(cls, root: bytes, tokens: Sequence[int]) -> PageKey:
        """Of the page that a text begins with."""
        return cls._of(root, tokens, 0)

    def next(self, tokens: Sequence[int]) -> PageKey:
        """Of the page after this one."""
        return self._of(self.digest, tokens, self.depth + 1)

    def snapshot(self, waiting: int) -> PageKey:
        """Of the snapshot at the end of this page, if so many tokens wait beside its state: no token has such an id."""
        return self.next([-1 - waiting])

    @property
    def is_snapshot(self) -> bool:
        """Whether it is of a snapshot."""
        return len(self.tokens) == 4 and self.tokens[3] > 127

    @classmethod
    def _of(cls, parent: bytes, tokens: Sequence[int], depth: int) -> PageKey:
        packed = struct.pack(f"<{len(tokens)}i", *tokens)
        return cls(parent, packed, depth, sha256(parent + packed).digest())
