"""`Pipeline`: the driver's end, from which steps go through the stages of the other ranks and come back."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from latentkv.errors import EngineStoppedError, RankError, StageError
from latentkv.models.batch import Batch
from latentkv.models.forms import Form
from latentkv.parallel.messages import Kind, Message, batch_numbers
from latentkv.parallel.ranks import Ranks


class Pipeline:
    """Has the other ranks go on with what the driver's own layers gave. Use it from one thread.

    Every rank takes messages in the order in which they were sent: pages and slots that a step leaves may be given to a
    later one at once.

    Args:
        ranks: of the driver, which is the first one.

    Attributes:
        depth: steps that can be under way at once, so that every rank has work.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.depth = ranks.size
        self._ranks, self._ring = ranks, ranks.ring
        self._next = 0
        self._under_way: deque[int] = deque()
        self._closed = False

    @property
    def num_under_way(self) -> int:
        """Steps that are submitted and not collected."""
        return len(self._under_way)

    def submit(self, batch: Batch, form: Form | None, x: Tensor) -> None:
        """Send a step on its way.

        Args:
            batch: its tokens.
            form: of latent attention, as the driver's layers had it.
            x: what those gave.

        Raises:
            EngineStoppedError: it is closed.
            RankError: the next rank is gone.
        """
        if self._closed:
            raise EngineStoppedError("The other ranks have ended: start all of them again.")
        self._send(Message(Kind.STEP, self._next, batch_numbers(batch, form), x))
        self._under_way.append(self._next)
        self._next += 1

    def collect(self) -> Tensor:
        """The final hidden states [T, hidden] of the step that was submitted first of those under way.

        Raises:
            StageError: a rank could not compute its part of it.
            RankError: a rank is gone.
        """
        number = self._under_way.popleft()
        message = self._receive()
        if message.number != number:
            raise RankError(self._ring.before, f"answered to step {message.number} where {number} was due")
        if message.kind == Kind.FAILED and message.x is not None:
            raise StageError(int(message.numbers[0]), bytes(message.x.tolist()).decode(errors="replace"))
        if message.kind != Kind.STEP or message.x is None:
            raise RankError(self._ring.before, "answered what was not asked")
        return message.x

    def copy_slot(self, source: int, target: int) -> None:
        """Have every rank copy the recurrent states of one slot into another.

        Raises:
            RankError: the next rank is gone.
        """
        self._send(Message(Kind.COPY, numbers=torch.tensor([source, target], dtype=torch.int32)))

    def close(self) -> None:
        """Let the other ranks end, and wait until they have heard of it; more than once does no harm.

        Raises:
            RankError: one of them is gone.
        """
        if self._closed:
            return
        self._closed = True
        self._send(Message(Kind.STOP))
        while self._receive().kind != Kind.STOP:  # of steps that nobody waited for
            pass
        self._ring.flush()
        self._ranks.leave()

    def _send(self, message: Message) -> None:
        try:
            self._ring.send(message)
        except RankError as error:
            raise self._ranks.culprit(error) from error

    def _receive(self) -> Message:
        try:
            return self._ring.receive()
        except RankError as error:
            raise self._ranks.culprit(error) from error
