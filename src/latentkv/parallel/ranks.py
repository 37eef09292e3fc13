"""`Ranks`: this process among those that run a model together, and what they tell each other before the first step."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from latentkv.errors import ConfigError, LatentKVError, RankError
from latentkv.kernels import extension
from latentkv.parallel.network import choose_interface
from latentkv.parallel.process import LOOPBACK_VARIABLE, local_size, world_size
from latentkv.parallel.ring import Ring
from latentkv.parallel.store import Store
from latentkv.parallel.watch import Watch, beat_key, end_process

_LOOK_SECONDS = 0.02
_GRACE_SECONDS = 1.0  # beyond the timeout, for the store to tell that it is over
_LAST_WORDS_SECONDS = 1.0  # for a rank to say why it has ended
_FOR_EVER = timedelta(days=365)  # that a message may take: `Watch` tells whether to go on waiting
_BOOT, _PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_HAS_TO_BE_ALIKE = "has to be the same on every rank: start them alike"


class Ranks:
    """This process among all: each stage has a team of so many ranks, one after the other.

    Args:
        store: that all share.
        rank: this process.
        size: of all.
        team_size: ranks of a stage.
        local_size: processes on this machine.
        timeout: seconds without a word of a rank after which it is given up.

    Attributes:
        ring: for what is sent from stage to stage; of this rank if it is the first of its team, else of that one.
        team: the ranks of this one's stage.
        watch: who is alive.
        lost: what became of a rank that was lost: nothing can be computed any more.
        when_lost: called when one is.
    """

    def __init__(
        self, store: Store, rank: int, size: int, local_size: int, timeout: float, *, team_size: int = 1
    ) -> None:
        self.rank, self.size, self.local_size, self.timeout = rank, size, local_size, timeout
        first = rank - rank % team_size
        self.team = range(first, first + team_size)
        self.ring = Ring(first, range(0, size, team_size))
        self._store = store
        self._places: list[dict[str, Any]] = []
        self._neighbours: dict[int, int] = {}  # descriptors of the other processes on this machine
        self.lost: RankError | None = None
        self.when_lost: Callable[[], None] = _nothing
        self.watch = Watch(store.clone(), rank, size, timeout, before_the_end=self._lose, ended=self._ended_neighbour)

    @property
    def is_driver(self) -> bool:
        """Whether this rank has the requests."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        """The number of this rank's stage."""
        return self.rank // len(self.team)

    def is_beside(self, rank: int) -> bool:
        """Whether a rank is on the same machine; known once all have agreed."""
        own, other = self._places[self.rank]["machine"], self._places[rank]["machine"]
        return rank == self.rank or bool(own and own == other)

    @property
    def shares_memory(self) -> bool:
        """Whether the ranks of a team have memory in common, as all can or none has; known once all have agreed."""
        return all(place["shares"] for place in self._places) and all(self.is_beside(rank) for rank in self.team)

    def ended(self, rank: int) -> int:
        """A descriptor that is readable once a rank on the same machine has ended; -1 where there is none."""
        return self._neighbours.get(rank, -1)

    def tell(self, what: str, said: Mapping[str, Any]) -> None:
        """Let the others know something, once."""
        self._store.set(_key(what, self.rank), json.dumps(said))

    def hear(self, what: str, rank: int) -> dict[str, Any]:
        """What a rank tells, as soon as it does.

        Raises:
            RankError: it has ended instead, and said why.
        """
        try:
            while not self._store.check([_key(what, rank)]):
                self._raise_if_ended()
                time.sleep(_LOOK_SECONDS)
            return json.loads(self._store.get(_key(what, rank)))
        except RuntimeError as error:
            raise RankError(0, "is gone, and with it the store that all ranks share") from error

    def hear_all(self, what: str) -> list[dict[str, Any]]:
        """What all ranks tell, this one's among it.

        Raises:
            RankError: as `hear`.
        """
        return [self.hear(what, rank) for rank in range(self.size)]

    def give_up(self, error: BaseException) -> None:
        """Let the others know that this rank cannot go on, so that they end as well."""
        said = str(error) if isinstance(error, LatentKVError) else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store is gone
            self.tell("ended", {"why": said, "because_of": error.rank if isinstance(error, RankError) else None})

    def loss(self, error: RankError) -> RankError:
        """What became of the first rank that was lost, where an error tells of one that is gone."""
        if self.lost is None:
            self.lost = self.culprit(error)
            self.watch.stop()
        return self.lost

    def culprit(self, error: RankError) -> RankError:
        """Of an error that tells of a neighbour who is gone: of the rank that ended first, which it may be or not."""
        rank, seen = error.rank, {self.rank}
        with suppress(RuntimeError):  # the store is gone, too
            while rank not in seen:
                seen.add(rank)
                deadline = time.monotonic() + _LAST_WORDS_SECONDS
                while not self._store.check([_key("ended", rank)]):
                    if time.monotonic() > deadline:
                        return RankError(rank, error.what)
                    time.sleep(_LOOK_SECONDS)
                said = json.loads(self._store.get(_key("ended", rank)))
                if said["because_of"] is None:
                    return RankError(rank, f"has ended ({said['why']})")
                rank = said["because_of"]
        return RankError(rank, error.what)

    def _end_neighbours(self) -> None:
        """Kill the other ranks on this machine: one of all is lost, and one that hangs would stay for ever."""
        for process in self._neighbours.values():
            with suppress(OSError):
                signal.pidfd_send_signal(process, signal.SIGKILL)

    def agree(self, said: Mapping[str, Any]) -> None:
        """Compare what has to be the same on all ranks.

        Raises:
            ConfigError: it is not; the sentence names the rank and both values. Every rank raises it.
        """
        shares = extension is not None and hasattr(os, "memfd_create")
        own = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "shares": shares}
        self.tell("where", own)
        places = self._places = self.hear_all("where")
        self._neighbours = {
            rank: descriptor
            for rank, each in enumerate(places)
            if rank != self.rank and self.is_beside(rank)
            if (descriptor := _held(each["process"])) is not None
        }
        self.tell("agree", {**_program(), **said})
        first, *others = self.hear_all("agree")
        self.tell("compared", {})
        for rank, other in enumerate(others, start=1):
            for name, value in other.items():
                if value != first.get(name):
                    self._wait_for_all("compared")  # each is to see it for itself before the first one ends
                    raise ConfigError(
                        f"Rank {rank} ({places[rank]['host']}) has {name} {value}, and rank 0 ({places[0]['host']}) "
                        f"{first.get(name)}: this {_HAS_TO_BE_ALIKE}."
                    )

    def leave(self) -> None:
        """End the connections; the others end theirs."""
        self.watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _ended_neighbour(self) -> RankError | None:
        """Of a rank on this machine that has ended: while nothing is computed nobody else tells the driver."""
        ended = next((rank for rank, descriptor in self._neighbours.items() if has_ended(descriptor)), None)
        return None if ended is None else self.culprit(RankError(ended, "is gone"))

    def _lose(self, error: RankError) -> None:
        self.lost = error
        if not has_ended(self.ended(error.rank)):  # one that hangs is not the only one, perhaps
            self._end_neighbours()
        self.when_lost()

    def _wait_for_all(self, what: str) -> None:
        """Wait a moment until all ranks have told something."""
        keys, deadline = [_key(what, rank) for rank in range(self.size)], time.monotonic() + _LAST_WORDS_SECONDS
        with suppress(RuntimeError):  # who has the store has ended already
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)

    def _raise_if_ended(self) -> None:
        for rank in range(self.size):
            if rank != self.rank and self._store.check([_key("ended", rank)]):
                why = json.loads(self._store.get(_key("ended", rank)))["why"]
                raise RankError(rank, f"has ended ({why})")


def join(num_stages: int, *, team_size: int = 1, timeout: float, trust_network: bool = False) -> Ranks:
    """Take part in the processes that torchrun has started.

    Args:
        num_stages: that the model is cut into.
        team_size: processes of each stage.
        timeout: seconds without a word of a rank after which it is given up.
        trust_network: whether addresses that are not private will do.

    Raises:
        ConfigError: there are not so many processes, or they would talk over an address that anybody can reach.
        RankError: a rank did not come.
    """
    size = num_stages * team_size
    if world_size() != size:
        raise ConfigError(
            f"{size} ranks are asked for, and {world_size()} started: run it as torchrun --nproc-per-node {size} "
            "-m latentkv ..., or over several machines as docs/parallel.md tells."
        )
    choose_interface(on_one_machine=local_size() == size, trust_network=trust_network)
    rank = int(os.environ["RANK"])
    with _deadline(timeout + _GRACE_SECONDS, rank):
        return _join(rank, size, team_size, timeout)


def _join(rank: int, size: int, team_size: int, timeout: float) -> Ranks:
    try:
        store = _store(timeout)
        store.set_timeout(timedelta(seconds=timeout))
        store.set(beat_key(rank), "0")
        store.wait([beat_key(other) for other in range(size)], timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ConfigError(
            f"Not all of {size} ranks have come within {timeout:.0f} seconds ({str(error).splitlines()[0][:200]}): "
            "start those that are missing, or allow more by --rank-timeout."
        ) from error
    ranks = Ranks(store, rank, size, local_size(), timeout, team_size=team_size)
    ranks.watch.start()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_FOR_EVER)
    return ranks


@contextmanager
def _deadline(seconds: float, rank: int) -> Generator[None]:
    """End the process where all have not met after so long: a store that is stopped lets nobody go on, nor give up."""
    late = RankError(1 if rank == 0 else 0, f"did not answer for {seconds:.0f} seconds")
    timer = threading.Timer(seconds, end_process, (late,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store(timeout: float) -> Any:
    """The store where ranks meet: torchrun's, or the first rank's own on the loopback interface.

    Raises:
        RuntimeError: it cannot be had in time.
    """
    if not os.environ.get(LOOPBACK_VARIABLE):
        return next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
    port, listening = int(os.environ["MASTER_PORT"]), None
    if os.environ["RANK"] == "0":
        try:
            listening = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(f"port {port}: {error.strerror}") from error
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1",
        port,
        is_master=listening is not None,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )


def has_ended(process: int) -> bool:
    """Whether the process of a descriptor has; False where there is none (-1)."""
    looking = select.poll()
    if process >= 0:
        looking.register(process, select.POLLIN)
    return bool(looking.poll(0))


def _machine() -> str:
    """What processes have in common that can send each other signals."""
    try:
        return f"{_BOOT.read_text().strip()} {_PROCESSES.readlink()}"
    except OSError:
        return ""


def _held(process: int) -> int | None:
    """A descriptor of a process, which never comes to mean another one; None where there are none."""
    try:
        return os.pidfd_open(process)
    except (AttributeError, OSError):
        return None


def _program() -> dict[str, str]:
    try:
        own = version("latentkv")
    except PackageNotFoundError:
        own = "from its source"
    return {"latentkv": own, "torch": torch.__version__}


def _nothing() -> None:
    pass


def _key(what: str, rank: int) -> str:
    return f"latentkv/{what}/{rank}"
