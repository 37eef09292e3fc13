"""`LimitedProcesses`: what strangers wrote is run in processes that may take so much time and memory, and no more."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from latentkv.errors import LatentKVError

Limit = Literal["time", "memory", "end", "wait"]

MAX_PROCESSES = 2

_RUNNER = Path(__file__).with_name("limited_worker.py")
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # of the environment; what else is in it is not theirs
_HEAD, _LENGTH = struct.Struct("<Qd"), struct.Struct("<Q")


@dataclass(frozen=True)
class Task:
    """What a worker is asked.

    Attributes:
        content: as the worker knows it.
        seconds: processor time that it may take.
        wait: seconds until it is given up.
    """

    content: bytes
    seconds: float
    wait: float


class RefusedError(Exception):
    """The worker says in a sentence what is wrong with a task.

    Attributes:
        first: whether it was the one that each process is given first.
    """

    first = False


class LimitError(Exception):
    """A task takes more than it may.

    Attributes:
        limit: "time" of the processor, "memory" (as the worker noticed itself), "end" (something ended the process, as
            too little memory may) or "wait" (it did not come to an end, on a machine that is busy otherwise).
        first: whether it was the one that each process is given first.
    """

    first = False

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.limit: Limit = limit


class LimitedProcesses:
    """Processes of one kind that are started when they are needed, stay for the next time, and end with this one.

    Use it from any thread; a process that was forked from this one starts its own.

    Args:
        worker: file with the function that does the tasks; see `limited_worker.py`.
        packages: those that it imports, besides the standard library.
        memory: bytes of address space of a process, those of an empty one (about 30 MiB) included.
        arguments: for its function.
        first: task that each process is given before all others.
        most: processes at once; further tasks wait.
        apart: each task is done in a copy of its process that ends with it, and finds nothing of the tasks before.
    """

    def __init__(
        self,
        worker: Path,
        packages: Sequence[str],
        *,
        memory: int,
        arguments: Sequence[str] = (),
        first: Task | None = None,
        most: int = MAX_PROCESSES,
        apart: bool = False,
    ) -> None:
        self._packages = packages
        self._limits = ["apart" if apart else "together", str(memory)]
        self._program = [str(worker), *arguments]
        self._first, self._most = first, most
        self._begin()
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (it := own()) and it._begin())

    def ask(self, task: Task) -> bytes:
        """The answer to a task.

        Raises:
            RefusedError: the worker cannot do it.
            LimitError: it takes more than it may.
            OSError: no process can be started.
        """
        with self._slots:
            process = self._take()
            how, answer = process.ask(task)
            self._idle.append(process)
        if how == b"-":
            raise RefusedError(_text(answer))
        return bytes(answer)

    def close(self) -> None:
        """End the processes that have nothing to do."""
        while self._idle:
            self._idle.pop().end()

    def __del__(self) -> None:
        self.close()

    def _begin(self) -> None:
        self._idle: deque[_Process] = deque()
        self._slots = threading.BoundedSemaphore(self._most)

    def _take(self) -> _Process:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return self._start()
            if process.lives:
                return process
            process.end()

    def _start(self) -> _Process:
        places = dict.fromkeys(str(_place(package)) for package in self._packages)
        process = _Process([*self._limits, os.pathsep.join(places), *self._program])
        if self._first is not None:
            try:
                how, answer = process.ask(self._first)
                if how == b"-":
                    process.end()
                    raise RefusedError(_text(answer))
            except (RefusedError, LimitError) as error:
                error.first = True
                raise
        return process


class _Process:
    """One process, and the socket by which it is asked; it ends when that is closed, however this process ends."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_RUNNER), *arguments],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
                )
        except OSError:
            self._socket.close()
            raise

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, task: Task) -> tuple[bytes, memoryview]:
        """(+ or -, the answer); an error ends the process."""
        try:
            how, answer = self._ask(task)
            if how == b"!":
                raise LimitError("memory")
        except BaseException:
            self.end()
            raise
        return how, answer

    def end(self) -> None:
        """End it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, task: Task) -> tuple[bytes, memoryview]:
        deadline = time.monotonic() + task.wait
        try:
            self._socket.settimeout(task.wait)
            self._socket.sendall(_HEAD.pack(len(task.content), task.seconds) + task.content)
            (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
            answer = self._receive(length, deadline)
        except TimeoutError:
            raise LimitError("wait") from None
        except OSError:  # it has ended, and so the socket
            raise LimitError("time" if self._process.wait() == -signal.SIGPROF else "end") from None
        return bytes(answer[:1]), answer[1:]

    def _receive(self, count: int, deadline: float) -> memoryview:
        into = memoryview(bytearray(count))
        left = into
        while left:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            received = self._socket.recv_into(left)
            if not received:
                raise ConnectionResetError
            left = left[received:]
        return into


def _text(answer: memoryview) -> str:
    return str(answer, "utf-8", "surrogatepass")


def _place(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise LatentKVError(f"The package {package} is needed, and cannot be found: install it.")
    return Path(spec.origin).parents[1]
