"""`Pipeline`: the driver's end, from which steps go to the other ranks, and through their stages, and come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from latentkv.errors import EngineStoppedError, RankError, StageError
from latentkv.models.batch import Batch
from latentkv.models.forms import Form
from latentkv.parallel.messages import Kind, Message, batch_numbers
from latentkv.parallel.ranks import Ranks
from latentkv.parallel.team import ShardTeam


class Pipeline:
    """Has the other ranks go on with what the driver's own layers gave. Use it from one thread.

    Every rank takes messages in the order in which they were sent: pages and slots that a step leaves may be given to a
    later one at once.

    Args:
        ranks: of the driver, which is the first one.
        team: of the first stage, where it has several.

    Attributes:
        depth: steps that can be under way at once, so that every stage has work.
    """

    def __init__(self, ranks: Ranks, team: ShardTeam | None = None) -> None:
        self.depth = ranks.ring.size
        self._ranks, self._ring, self._team = ranks, ranks.ring, team
        self._next = 0
        self._under_way: deque[int] = deque()
        self._here: deque[Tensor] = deque()  # of the only stage
        self._why_closed = ""

    @property
    def num_under_way(self) -> int:
        """Steps that are submitted and not collected."""
        return len(self._under_way)

    @contextmanager
    def leading(self, batch: Batch, form: Form | None, x: Tensor) -> Generator[None]:
        """Have the other ranks of this stage compute their shards of a step while the driver computes its own.

        Args:
            batch: its tokens.
            form: of latent attention.
            x: what the first layer reads.

        Raises:
            EngineStoppedError: it is closed, or was interrupted.
            StageError: another rank could not compute its part of it.
            RankError: another rank is gone.
        """
        if self._team is None:
            yield
            return
        self._require_open()
        with self._team.step(Message(Kind.STEP, self._next, batch_numbers(batch, form), x)):
            yield

    def submit(self, batch: Batch, form: Form | None, x: Tensor) -> None:
        """Send a step on its way.

        Args:
            batch: its tokens.
            form: of latent attention, as the driver's layers had it.
            x: what those gave.

        Raises:
            EngineStoppedError: it is closed, or was interrupted.
            RankError: another rank is gone.
        """
        with self._whole():
            if self.depth > 1:
                self._ring.send(Message(Kind.STEP, self._next, batch_numbers(batch, form), x))
            else:
                self._here.append(x)
            self._under_way.append(self._next)
            self._next += 1

    def collect(self) -> Tensor:
        """The final hidden states [T, hidden] of the step that was submitted first of those under way.

        Raises:
            EngineStoppedError: it is closed, or was interrupted.
            StageError: a rank could not compute its part of it.
            RankError: a rank is gone.
        """
        with self._whole():
            number = self._under_way.popleft()
            if self._here:
                return self._here.popleft()
            message = self._ring.receive()
            self._ring.arrived(number)
            if message.number != number or message.kind not in (Kind.STEP, Kind.FAILED) or message.x is None:
                raise RankError(self._ring.before, f"answered something else where step {number} was due")
        if message.kind == Kind.FAILED:
            raise StageError(int(message.numbers[0]), bytes(message.x.tolist()).decode(errors="replace"))
        return message.x

    def copy_slot(self, source: int, target: int) -> None:
        """Have every rank copy the recurrent states of one slot into another.

        Raises:
            EngineStoppedError: it is closed, or was interrupted.
            RankError: another rank is gone.
        """
        with self._whole():
            message = Message(Kind.COPY, self._next, torch.tensor([source, target], dtype=torch.int32))
            self._tell_team(message)
            if self.depth > 1:
                self._ring.send(message)

    def close(self) -> None:
        """Let the other ranks end, and wait until they have heard of it; more than once does no harm.

        Raises:
            RankError: one of them is gone.
        """
        if self._why_closed and self._ranks.lost is None:
            return
        self._ranks.watch.expect_end()
        with self._whole():
            self._why_closed = "The other ranks have ended: start all of them again."
            message = Message(Kind.STOP, self._next)
            self._tell_team(message)
            if self.depth > 1:
                self._ring.send(message)
                while self._ring.receive().kind != Kind.STOP:  # of steps that nobody waited for
                    pass
                self._ring.flush()
        self._ranks.leave()

    def _tell_team(self, message: Message) -> None:
        """Have the other ranks of this stage do what cannot be done without any of them.

        Raises:
            RankError: one of them could not, or is gone.
        """
        if self._team is None:
            return
        try:
            with self._team.step(message):
                pass
        except StageError as error:
            raise RankError(error.rank, f"could not do what all have done ({error.why})") from error

    def _require_open(self) -> None:
        if self._ranks.lost is not None:
            raise self._ranks.lost
        if self._why_closed:
            raise EngineStoppedError(self._why_closed)

    @contextmanager
    def _whole(self) -> Generator[None]:
        """A message is sent or received whole, or there are no more: half of one would be taken for another."""
        self._require_open()
        try:
            yield
        except RankError as error:
            raise self._ranks.loss(error) from error
        except BaseException:
            self._why_closed = "It was interrupted while it talked to the other ranks: start all of them again."
            raise
