"""What several processes add up in a step: through memory that they share, or else over gloo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from latentkv.errors import ConfigError, RankError
from latentkv.kernels import extension
from latentkv.ops.native.shared_sum import SharedSum, shared_bytes
from latentkv.parallel.messages import HEAD_NUMBERS, Message, body_bytes, message_of
from latentkv.parallel.ranks import Ranks
from latentkv.parallel.ring import Outgoing, receive


class Sums(Protocol):
    """What the processes of a team tell each other, all making the same calls in the same order.

    The first one begins a step by telling the others what it is.
    """

    def tell(self, message: Message) -> None:
        """Begin the next step, with a message to all others."""
        ...

    def hear(self) -> Message:
        """Begin the next step, with the message of the first one."""
        ...

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The float32 parts of all of them added up in their order, and the residual, rounded once to `dtype`."""
        ...

    def gather(self, own: Tensor, widths: Sequence[int], *, wanted: bool) -> Tensor | None:
        """All processes' own [T, widths[r]] float32 side by side, where that is wanted."""
        ...


class MemorySums(SharedSum):
    """Sums through memory that the processes share: some microseconds each."""

    def tell(self, message: Message) -> None:
        """See `Sums`."""
        self.begin()
        for part in (message.head(), message.body()):
            self.broadcast(part)

    def hear(self) -> Message:
        """See `Sums`."""
        self.begin()
        head = torch.empty(HEAD_NUMBERS, dtype=torch.int64)
        self.broadcast(head)
        body = torch.empty(body_bytes(head), dtype=torch.uint8)
        self.broadcast(body)
        return message_of(head, body)


class NetworkSums:
    """Sums over gloo: some hundred microseconds each, and no step with one is recorded.

    Args:
        team: the ranks, in their order.
        rank: this one of them.
    """

    def __init__(self, team: Sequence[int], rank: int) -> None:
        self._team, self._rank = team, rank
        # Every rank takes part in making every group.
        firsts = range(0, dist.get_world_size(), len(team))
        groups = [dist.new_group(range(first, first + len(team))) for first in firsts]
        self._group = groups[rank // len(team)]
        self._others = [Outgoing(other) for other in team[1:]] if rank == team[0] else []

    def tell(self, message: Message) -> None:
        """See `Sums`."""
        for other in self._others:
            other.flush()  # what they were told before is known to them
            other.send(message)

    def hear(self) -> Message:
        """See `Sums`."""
        return receive(self._team[0])

    def sum(self, part: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Sums`."""
        parts = [torch.empty_like(part) for _ in self._team]
        try:
            dist.all_gather(parts, part.contiguous(), group=self._group)
        except RuntimeError as error:
            raise self._lost() from error
        whole = parts[0]
        for other in parts[1:]:
            whole += other
        return (whole if residual is None else whole.add_(residual)).to(dtype)

    def gather(self, own: Tensor, widths: Sequence[int], *, wanted: bool) -> Tensor | None:
        """See `Sums`."""
        try:
            if not wanted:
                dist.send(own.contiguous(), self._team[0])
                return None
            others = [own.new_empty(len(own), width) for width in widths[1:]]
            for rank, theirs in zip(self._team[1:], others, strict=True):
                dist.recv(theirs, rank)
        except RuntimeError as error:
            raise self._lost() from error
        return torch.cat([own, *others], dim=1)

    def _lost(self) -> RankError:
        return RankError(next(rank for rank in self._team if rank != self._rank), "is gone")


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
    ranks.tell("shares", {"can": extension is not None and hasattr(os, "memfd_create")})
    if not all(said["can"] for said in ranks.hear_all("shares")):
        return NetworkSums(team, ranks.rank)
    # It has no name that could be left behind: it is gone with the last of the processes.
    if ranks.rank == team[0]:
        file = os.memfd_create("latentkv-sums", os.MFD_CLOEXEC)
        os.ftruncate(file, shared_bytes(len(team)))
        ranks.tell("memory of sums", {"path": f"/proc/{os.getpid()}/fd/{file}"})
    else:
        path = ranks.hear("memory of sums", team[0])["path"]
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"Rank {ranks.rank} cannot share memory with rank {team[0]} ({path}: {error.strerror}): run both as "
                "one user in one container, or use pipeline_parallel."
            ) from error
    sums = MemorySums(file, ranks.rank - team[0], len(team), [ranks.ended(rank) for rank in team])
    ranks.tell("shared", {})
    for rank in team:
        ranks.hear("shared", rank)
    os.close(file)
    return sums
