"""How a published tensor is made of those in a GGUF file: whole rows chosen and ordered, or two matrices joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows stand whole in one of the file's, so that blocks of quantised weights stay as they are.

    The file's rows are counted through all of its leading dimensions; those of a vector are its numbers.

    Attributes:
        source: the file's tensor.
        shape: of the published tensor; of stacked ones [E, O, D].
        start: the file's first row.
        stride: rows in the file from one stacked matrix to the next; 0 where they follow each other.
        heads: groups of rows whose two halves the file holds interleaved (llama.cpp's order of rotary dimensions),
            to be put back one after the other; 0: the order is that of the file.
    """

    source: str
    shape: tuple[int, ...]
    start: int = 0
    stride: int = 0
    heads: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The file's tensors that it needs."""
        return (self.source,)

    def order(self) -> Tensor:
        """The number of each row in the file, int64 [rows]."""
        stacks, each = (self.shape[0], self.shape[1]) if len(self.shape) == 3 else (1, self.shape[0])
        first = self.start + torch.arange(stacks) * (self.stride or each)
        order = (first[:, None] + torch.arange(each)).flatten()
        return order.view(self.heads, -1, 2).transpose(1, 2).flatten() if self.heads else order

    def take(self, stored: Tensor) -> Tensor:
        """The published tensor from the file's one, or its bytes from the file's.

        Args:
            stored: numbers in the file's shape, or uint8 [..., O, bytes of a row]; of a vector numbers [O].

        Returns:
            [*leading dimensions, what a row holds]; a view where nothing is moved.
        """
        rows = stored[:, None] if stored.ndim == 1 else stored.flatten(0, -2)
        count = self.shape[0] * (self.shape[1] if len(self.shape) == 3 else 1)
        moved = self.heads or (self.stride and len(self.shape) == 3)
        taken = rows[self.order()] if moved else rows[self.start : self.start + count]
        return taken.flatten() if len(self.shape) == 1 else taken.unflatten(0, self.shape[:-1])


@dataclass(frozen=True)
class JoinedHeads:
    """A kv_b_proj, which newer files hold as two tensors: each head's key part, transposed, and its value part.

    Its rows are no rows of the file, so it takes numbers, not blocks.

    Attributes:
        key: the file's tensor [H, L, N]; or the same numbers as [H L, N].
        value: the file's tensor [H, V, L]; or the same numbers as [H V, L].
        heads: H.
        shape: of the published tensor, [H (N + V), L].
    """

    key: str
    value: str
    heads: int
    shape: tuple[int, int]

    @property
    def sources(self) -> tuple[str, ...]:
        """The file's tensors that it needs."""
        return (self.key, self.value)

    def join(self, key: Tensor, value: Tensor) -> Tensor:
        """The published tensor from the numbers of the file's two."""
        latent = self.shape[1]
        keys = key.reshape(self.heads, latent, -1).transpose(1, 2)
        return torch.cat([keys, value.reshape(self.heads, -1, latent)], dim=1).reshape(self.shape)


Recipe = Rows | JoinedHeads
"""How one published tensor is made."""
