"""`Ring`: messages from each rank to the next, and from the last one back to the first."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from latentkv.errors import RankError
from latentkv.parallel.messages import HEAD_NUMBERS, Message, body_bytes, message_of


class Ring:
    """A rank's place among the others; messages arrive in the order in which they were sent.

    Args:
        rank: this process.
        size: of all.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.before, self.after = (rank - 1) % size, (rank + 1) % size
        self._under_way: deque[tuple[int, dist.Work, Tensor]] = deque()

    def send(self, message: Message) -> None:
        """Send to the next rank, without waiting until it has the message; its memory is kept until `arrived`.

        Raises:
            RankError: the next rank is gone.
        """
        try:
            for part in (message.head(), message.body()):
                work = dist.isend(part, self.after) if len(part) else None
                if work is not None:
                    self._under_way.append((message.number, work, part))
        except RuntimeError as error:
            raise RankError(self.after, "is gone") from error

    def arrived(self, number: int) -> None:
        """Let go of messages up to those of step `number`, of which is known that they have arrived.

        gloo itself does not tell before somebody waits.

        Raises:
            RankError: the next rank is gone.
        """
        while self._under_way and self._under_way[0][0] <= number:
            self._wait_for_first()

    def flush(self) -> None:
        """Wait until all has arrived that was sent.

        Raises:
            RankError: the next rank is gone.
        """
        while self._under_way:
            self._wait_for_first()

    def receive(self) -> Message:
        """Wait for the next message of the rank before.

        Raises:
            RankError: that rank is gone.
        """
        try:
            head = torch.empty(HEAD_NUMBERS, dtype=torch.int64)
            dist.recv(head, self.before)
            body = torch.empty(body_bytes(head), dtype=torch.uint8)
            if len(body):
                dist.recv(body, self.before)
        except RuntimeError as error:
            raise RankError(self.before, "is gone") from error
        return message_of(head, body)

    def _wait_for_first(self) -> None:
        try:
            self._under_way.popleft()[1].wait()
        except RuntimeError as error:
            raise RankError(self.after, "is gone") from error
