"""`ShardTeam`: the ranks of one stage, each with a shard of its layers, whose blocks they add up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from latentkv.errors import RankError, StageError
from latentkv.ops.native.shared_sum import errors
from latentkv.parallel.messages import Kind, Message
from latentkv.parallel.sums import MemorySums, Sums


class ShardTeam:
    """One of the ranks of a stage. The first of them leads: it has the stage's messages, and hands them on.

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
        self._rank, self._team, self._widths, self._sums, self._loss = rank, team, widths, sums, loss

    @property
    def leads(self) -> bool:
        """Whether the others have their messages from this rank."""
        return self._rank == self._team[0]

    def tell(self, message: Message) -> None:
        """Hand a message on to the others, who are then to do what it says together with this rank.

        Raises:
            RankError: one of them is gone.
        """
        with self.step():
            self._sums.tell(message)

    def hear(self) -> Message:
        """Wait for the next message of the one that leads.

        Raises:
            StageError: it could not be told.
            RankError: a rank is gone.
        """
        with self.step():
            return self._sums.hear()

    @contextmanager
    def step(self) -> Generator[None]:
        """What all of them do together; where one of them fails, none goes on with it.

        Raises:
            StageError: another rank could not compute its part.
            RankError: another rank is gone.
        """
        try:
            yield
        except Exception as error:
            reason = self._give_up(error)
            if reason is error:
                raise
            raise (self._loss(reason) if isinstance(reason, RankError) else reason) from error

    def combine(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `models.shard.Team`."""
        return self._sums.sum(part.float(), residual, dtype)

    def logits(self, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """See `models.shard.Team`; in the ranks that do not lead there are none, [0]."""
        with self.step():
            if self.leads:
                self._sums.tell(Message(Kind.LOGITS, x=hidden))
            logits = self._sums.gather(own(hidden), self._widths, wanted=self.leads)
        return hidden.new_empty(0) if logits is None else logits

    def _give_up(self, error: Exception) -> Exception:
        """What becomes of a step in which something was raised here."""
        if not isinstance(self._sums, MemorySums):
            # Nobody could be told over gloo, where each waits for all.
            known = isinstance(error, RankError)
            return error if known else RankError(self._rank, f"could not compute a step ({error})")
        lost, failed = errors()
        if isinstance(error, lost):
            return RankError(self._team[self._sums.culprit], "is gone")
        culprit = self._sums.culprit if isinstance(error, failed) else self._team.index(self._rank)
        self._sums.fail(culprit)
        if isinstance(error, failed):
            return StageError(self._team[culprit], "its own messages say why")
        return error
