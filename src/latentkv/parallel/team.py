"""`ShardTeam`: the ranks of one stage, each with a shard of its layers, whose blocks they add up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from latentkv.errors import RankError, StageError
from latentkv.ops.native.shared_sum import SharedSum, errors
from latentkv.parallel.messages import Kind, Message
from latentkv.parallel.ring import Outgoing, receive
from latentkv.parallel.sums import Sums


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
        self._others = [Outgoing(other) for other in team[1:]] if rank == team[0] else []

    @property
    def leads(self) -> bool:
        """Whether the others have their messages from this rank."""
        return self._rank == self._team[0]

    def tell(self, message: Message) -> None:
        """Hand a message on to the others.

        Raises:
            RankError: one of them is gone.
        """
        try:
            for other in self._others:
                other.flush()  # what they were told before is known to them
                other.send(message)
        except RankError as error:
            raise self._loss(error) from error

    def hear(self) -> Message:
        """Wait for the next message of the one that leads.

        Raises:
            RankError: it is gone.
        """
        return receive(self._team[0])

    def flush(self) -> None:
        """Wait until the others have all messages.

        Raises:
            RankError: one of them is gone.
        """
        for other in self._others:
            other.flush()

    @contextmanager
    def step(self) -> Generator[None]:
        """What all of them compute together; where one of them fails, none goes on with it.

        Raises:
            StageError: another rank could not compute its part.
            RankError: another rank is gone.
        """
        try:
            self._sums.begin()
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
        if self.leads:
            self.tell(Message(Kind.LOGITS, x=hidden))
        with self.step():
            logits = self._sums.gather(own(hidden), self._widths, wanted=self.leads)
        return hidden.new_empty(0) if logits is None else logits

    def _give_up(self, error: Exception) -> Exception:
        """What becomes of a step in which something was raised here."""
        if not isinstance(self._sums, SharedSum):
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
