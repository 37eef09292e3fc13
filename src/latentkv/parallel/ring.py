"""`Ring`: messages from each stage to the next, and from the last one back to the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from latentkv.errors import RankError
from latentkv.parallel.messages import HEAD_NUMBERS, Message, body_bytes, message_of


class Outgoing:
    """Messages to one rank, which arrive in the order in which they were sent.

    Args:
        to: that rank.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self._under_way: deque[tuple[int, dist.Work, Tensor]] = deque()

    def send(self, message: Message) -> None:
        """Send without waiting until the other rank has the message; its memory is kept until `arrived`.

        Raises:
            RankError: the other rank is gone.
        """
        try:
            for part in (message.head(), message.body()):
                work = dist.isend(part, self.to) if len(part) else None
                if work is not None:
                    self._under_way.append((message.number, work, part))
        except RuntimeError as error:
            raise RankError(self.to, "is gone") from error

    def arrived(self, number: int) -> None:
        """Let go of messages up to those of step `number`, of which is known that they have arrived.

        gloo itself does not tell before somebody waits.

        Raises:
            RankError: the other rank is gone.
        """
        while self._under_way and self._under_way[0][0] <= number:
            self._wait_for_first()

    def flush(self) -> None:
        """Wait until all has arrived that was sent.

        Raises:
            RankError: the other rank is gone.
        """
        while self._under_way:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        try:
            self._under_way.popleft()[1].wait()
        except RuntimeError as error:
            raise RankError(self.to, "is gone") from error


class Ring:
    """A rank's place among those that stages have their messages from.

    Args:
        rank: this process.
        ranks: of the stages, in their order.
    """

    def __init__(self, rank: int, ranks: Sequence[int]) -> None:
        self.rank, self.size = rank, len(ranks)
        place = ranks.index(rank)
        self.before, self.after = ranks[place - 1], ranks[(place + 1) % len(ranks)]
        self._outgoing = Outgoing(self.after)

    def send(self, message: Message) -> None:
        """Send to the next stage, see `Outgoing.send`.

        Raises:
            RankError: its rank is gone.
        """
        self._outgoing.send(message)

    def arrived(self, number: int) -> None:
        """Let go of messages up to those of step `number`, see `Outgoing.arrived`.

        Raises:
            RankError: the rank of the next stage is gone.
        """
        self._outgoing.arrived(number)

    def flush(self) -> None:
        """Wait until all has arrived that was sent.

        Raises:
            RankError: the rank of the next stage is gone.
        """
        self._outgoing.flush()

    def receive(self) -> Message:
        """Wait for the next message of the stage before.

        Raises:
            RankError: its rank is gone.
        """
        return receive(self.before)


def receive(rank: int) -> Message:
    """Wait for the next message of a rank.

    Raises:
        RankError: it is gone.
    """
    try:
        head = torch.empty(HEAD_NUMBERS, dtype=torch.int64)
        dist.recv(head, rank)
        body = torch.empty(body_bytes(head), dtype=torch.uint8)
        if len(body):
            dist.recv(body, rank)
    except RuntimeError as error:
        raise RankError(rank, "is gone") from error
    return message_of(head, body)
