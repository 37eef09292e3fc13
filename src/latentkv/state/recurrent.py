"""What a recurrent layer keeps of a sequence: its bytes, and the memory that is allocated by them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


class RecurrentState(NamedTuple):
    """The memory of one recurrent layer, to be read and written in place: S slots, each one sequence's; all float32.

    A slot's state is that of the sequence's first tokens. The few tokens that may come after them wait in the slot as
    inputs of the recurrence: a draft is read before it is known which of its tokens are right (`models.batch.Batch`
    says how many count).

    Attributes:
        kept: each [S, ...], what the tokens that it has taken in have left: a matrix a head, and whatever else.
        waiting: each [S, K, ...], what the recurrence reads of the tokens that wait, the first token's row first.
    """

    kept: tuple[Tensor, ...]
    waiting: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, each [S, ...]."""
        return (*self.kept, *self.waiting)


@dataclass(frozen=True)
class RecurrentSpec:
    """The state of a recurrent layer, the same for every length.

    Attributes:
        kept: shapes of what is kept of a sequence.
        waiting: shapes of what waits of a drafted token.
        most_drafted: K, tokens of the longest draft.
    """

    kept: Shapes
    waiting: Shapes
    most_drafted: int = 0

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence."""
        return 4 * (sum(map(prod, self.kept)) + self.most_drafted * sum(map(prod, self.waiting)))

    def allocate(self, num_slots: int, device: torch.device | str = "cpu") -> RecurrentState:
        """Zeroed memory of `num_slots` sequences."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=torch.float32, device=device)

        return RecurrentState(
            kept=tuple(zeros(*shape) for shape in self.kept),
            waiting=tuple(zeros(self.most_drafted, *shape) for shape in self.waiting),
        )
