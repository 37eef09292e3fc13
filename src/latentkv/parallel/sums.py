"""What several processes add up in a step: through memory that they share, or else over gloo."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from latentkv.errors import ConfigError, RankError, StageError
from latentkv.ops.native.shared_sum import SharedSum, process_failed, process_lost, shared_bytes
from latentkv.parallel.memory import team_file
from latentkv.parallel.messages import HEAD_NUMBERS, Message, body_bytes, message_of
from latentkv.parallel.ranks import Ranks, has_ended
from latentkv.parallel.ring import Outgoing, receive

logger = logging.getLogger("latentkv.parallel")

_LOOK_SECONDS = 0.02
_LAST_WORDS_SECONDS = 1.0  # for a process whose connection is closed to end


class Sums(Protocol):
    """What the processes of a team tell each other, all making the same calls in the same order."""

    def begin(self, message: Message | None) -> Message:
        """Begin the next step, with a message of the first of them, which all get."""
        ...

    def end(self) -> None:
        """End the step, as all others do."""
        ...

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The float32 parts of all of them added up in their order, and the residual, rounded once to `dtype`."""
        ...

    def gather(self, own: Tensor, widths: Sequence[int], *, wanted: bool) -> Tensor | None:
        """All processes' own [T, widths[r]] float32 side by side, where that is wanted."""
        ...

    def give_up(self, error: BaseException) -> BaseException:
        """Take no further part in this step, in which something was raised here; what that means for this rank."""
        ...


class MemorySums:
    """Sums through memory that the processes share: some microseconds each.

    Args:
        memory: this process's place in it.
        rank: this process.
        team: the ranks of all, in their order.
    """

    def __init__(self, memory: SharedSum, rank: int, team: Sequence[int]) -> None:
        self._memory, self._own, self._team = memory, team.index(rank), team
        self.sum, self.gather, self.end = memory.sum, memory.gather, memory.end
        self.abandon = memory.abandon

    def begin(self, message: Message | None) -> Message:
        """See `Sums`."""
        self._memory.begin()
        if message is not None:
            for part in (message.head(), message.body()):
                self._memory.broadcast(part)
            return message
        head = torch.empty(HEAD_NUMBERS, dtype=torch.int64)
        self._memory.broadcast(head)
        body = torch.empty(body_bytes(head), dtype=torch.uint8)
        self._memory.broadcast(body)
        return message_of(head, body)

    def give_up(self, error: BaseException) -> BaseException:
        """See `Sums`: the others fail this step, too, and all go on with the next one."""
        if isinstance(error, process_lost()):
            return RankError(self._team[self._memory.culprit], "is gone")
        failed = isinstance(error, process_failed())
        culprit = self._memory.culprit if failed else self._own
        self._memory.fail(culprit)
        return StageError(self._team[culprit], "its own messages say why") if failed else error


class NetworkSums:
    """Sums over gloo: some hundred microseconds each, and no step with one is recorded.

    Args:
        team: the ranks, in their order.
        rank: this one of them.
        ended: of each of them a descriptor that is readable once it has ended; -1: nobody knows.
    """

    def __init__(self, team: Sequence[int], rank: int, ended: Sequence[int]) -> None:
        self._team, self._rank, self._ended = team, rank, ended
        # Every rank takes part in making every group.
        firsts = range(0, dist.get_world_size(), len(team))
        groups = [dist.new_group(range(first, first + len(team))) for first in firsts]
        self._group = groups[rank // len(team)]
        self._others = [Outgoing(other) for other in team[1:]] if rank == team[0] else []

    def begin(self, message: Message | None) -> Message:
        """See `Sums`."""
        if message is None:
            return receive(self._team[0])
        for other in self._others:
            other.send(message)
        return message

    def end(self) -> None:
        """See `Sums`; who fails a step ends, so nobody need be asked."""
        for other in self._others:
            other.flush()

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Sums`."""
        parts = [torch.empty_like(part) for _ in self._team]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        whole = parts[0]
        for other in parts[1:]:
            whole += other
        return (whole if residual is None else whole.add_(residual)).to(dtype)

    def gather(self, own: Tensor, widths: Sequence[int], *, wanted: bool) -> Tensor | None:
        """See `Sums`."""
        if not wanted:
            dist.send(own.contiguous(), self._team[0])
            return None
        others = [own.new_empty(len(own), width) for width in widths[1:]]
        for rank, theirs in zip(self._team[1:], others, strict=True):
            dist.recv(theirs, rank)
        return torch.cat([own, *others], dim=1)

    def give_up(self, error: BaseException) -> BaseException:
        """See `Sums`: over gloo each waits for all, and nobody could be told; this rank ends, and so do the others."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while isinstance(error, RuntimeError | RankError) and time.monotonic() < deadline:
            # gloo does not say who closed a connection.
            for rank, descriptor in zip(self._team, self._ended, strict=True):
                if has_ended(descriptor):
                    return RankError(rank, "is gone")
            time.sleep(_LOOK_SECONDS)
        return error if isinstance(error, RankError) else RankError(self._rank, f"could not compute a step ({error})")


def sums_of(ranks: Ranks) -> MemorySums | NetworkSums:
    """What a rank's team adds up by: memory, where all have the extension.

    Raises:
        ConfigError: they are not on one machine, or cannot share memory.
        RankError: another rank has ended.
    """
    team = ranks.team
    if not all(ranks.is_beside(rank) for rank in team):
        raise ConfigError(
            f"tensor_parallel needs ranks {team[0]} to {team[-1]} on one machine, where they share memory: over "
            "several machines use pipeline_parallel."
        )
    ended = [ranks.ended(rank) for rank in team]
    if not ranks.shares_memory:
        logger.warning(
            "The native kernels are missing, or memory cannot be shared here: ranks add up over gloo, which takes a "
            "hundred times as long, and each has all latents."
        )
        return NetworkSums(team, ranks.rank, ended)
    file = team_file(ranks, "sums", shared_bytes(len(team)))
    sums = MemorySums(SharedSum(file, ranks.rank - team[0], len(team), ended), ranks.rank, team)
    os.close(file)
    return sums
