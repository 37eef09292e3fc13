"""`ShardTeam`: the ranks of one stage, each with a shard of its layers, whose blocks they add up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from latentkv.errors import RankError
from latentkv.parallel.messages import Kind, Message
from latentkv.parallel.sums import Sums


class ShardTeam:
    """One of the ranks of a stage, of which the first leads: it has the stage's messages, and tells the others.

    See `models.shard.Team` for what layers and output head ask of it.

    Args:
        rank: this one.
        team: all of them, in the order of their shards.
        widths: tokens whose logits each of them computes.
        sums: what they add up by.
        loss: what becomes of an error that tells of a rank that is gone.
    """

    def __init__(
        self,
        rank: int,
        team: Sequence[int],
        widths: Sequence[int],
        sums: Sums,
        loss: Callable[[RankError], RankError],
    ) -> None:
        self._widths, self._sums, self._loss = widths, sums, loss
        self.leads = rank == team[0]

    @contextmanager
    def step(self, message: Message | None = None) -> Generator[Message]:
        """What all of them do together; where one of them fails, all do.

        Args:
            message: what it is, from the one that leads; the others get it.

        Raises:
            StageError: another rank could not do its part.
            RankError: another rank is gone.
        """
        try:
            yield self._sums.begin(message)
            self._sums.end()
        except BaseException as error:
            reason = self._sums.give_up(error)
            if reason is error:
                raise
            raise (self._loss(reason) if isinstance(reason, RankError) else reason) from error

    def combine(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `models.shard.Team`."""
        return self._sums.sum(part.float(), residual, dtype)

    def logits(self, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """See `models.shard.Team`; asked of the one that leads.

        The others are sent the states, though they had some of them: only those of chosen tokens become logits.
        """
        with self.step(Message(Kind.LOGITS, x=hidden)):
            logits = self.gather(own(hidden))
        return hidden.new_empty(0) if logits is None else logits

    def gather(self, own: Tensor) -> Tensor | None:
        """Logits [T, V] of all of them, each having its own; None where this rank does not lead."""
        return self._sums.gather(own, self._widths, wanted=self.leads)
