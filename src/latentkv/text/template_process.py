"""`TemplateProcesses`: chat templates are rendered in processes that may take so much time and memory, and no more."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latentkv.errors import TemplateLimitError, TokenizerError

RENDER_SECONDS = 0.4
"""Processor time that a template may take, to be read and to write one conversation."""

RENDER_MEMORY = 192 << 20
"""Bytes of address space of its process, those of an empty one (about 30 MiB) included."""

WAIT_SECONDS = 10.0
"""Time until it is given up, on a machine that is busy otherwise."""

MAX_CHARACTERS = 1 << 24
"""Of a rendered conversation."""

MAX_PROCESSES = 2

_JSON = json.JSONEncoder(ensure_ascii=False)
_WORKER = Path(__file__).with_name("template_worker.py")
_PACKAGES = ("jinja2", "markupsafe")
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # of the environment; what else is in it is not theirs


class TemplateProcesses:
    """Processes that are started when they are needed, stay for the next time, and end with this one.

    Use it from any thread; a process that was forked from this one starts its own.

    Args:
        most: processes at once; further templates wait.
    """

    def __init__(self, most: int = MAX_PROCESSES) -> None:
        self._most = most
        self._begin()
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (it := own()) and it._begin())

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """What a template writes.

        Args:
            source: of jinja2.
            variables: JSON values.

        Raises:
            TokenizerError: it cannot be read, or fails.
            TemplateLimitError: it takes more than it may.
        """
        return self._do({"source": source, "variables": variables})

    def reads_tools(self, source: str) -> bool:
        """Whether a template does anything with `tools`; raises as `render`."""
        return self._do({"source": source, "variables": None}) == "1"

    def _begin(self) -> None:
        self._idle: deque[_Process] = deque()
        self._slots = threading.BoundedSemaphore(self._most)

    def _do(self, task: Mapping[str, Any]) -> str:
        try:
            # Piece by piece, in Python: all at once, in C, nobody else runs until the last of its values is written.
            frame = "".join(_JSON.iterencode(task)).encode(errors="surrogatepass")
        except ValueError as error:  # an integer of thousands of digits
            raise TokenizerError(f"The chat template cannot be given what is no JSON: {error}.") from None
        with self._slots:
            process = self._take()
            try:
                how, text = process.ask(frame)
                stays = how.endswith(b".")
            except BaseException:
                process.end()
                raise
            if stays:
                self._idle.append(process)
            else:
                process.end()
        if how.startswith(b"-"):
            raise TokenizerError(text)
        if how.startswith(b"!"):
            raise TemplateLimitError(text)
        return text

    def _take(self) -> _Process:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return _Process()
            if process.lives:
                return process
            process.end()


@cache
def template_processes() -> TemplateProcesses:
    """Those of this process: all templates share them, as each call is held to the limits by itself."""
    return TemplateProcesses()


class _Process:
    """One process, and the socket by which it is asked; it ends when that is closed, however this process ends."""

    def __init__(self) -> None:
        places = dict.fromkeys(str(_place(package)) for package in _PACKAGES)
        limits = (str(RENDER_MEMORY), str(RENDER_SECONDS), str(MAX_CHARACTERS))
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_WORKER), *limits, *places],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
                )
        except OSError as error:
            self._socket.close()
            raise TokenizerError(f"The chat template cannot be run now ({error}): try again.") from error

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, frame: bytes) -> tuple[bytes, str]:
        """(how it went, the text); after an error the process can only be ended."""
        deadline = time.monotonic() + WAIT_SECONDS
        try:
            self._socket.settimeout(WAIT_SECONDS)
            self._socket.sendall(len(frame).to_bytes(8, "little") + frame)
            answer = self._receive(int.from_bytes(self._receive(8, deadline), "little"), deadline)
        except TimeoutError:
            raise TemplateLimitError(
                f"The chat template wrote nothing within {WAIT_SECONDS:g} s: try again, or shorten the conversation."
            ) from None
        except OSError:  # it has ended, and so the socket
            raise TemplateLimitError(self._why_it_ended()) from None
        return bytes(answer[:2]), str(answer[2:], "utf-8", "surrogatepass")

    def end(self) -> None:
        """End it, whatever it does."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

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

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"The chat template takes more than {RENDER_SECONDS:g} s: shorten the conversation, or change it."
        return f"The chat template was stopped: it nests too deeply, or takes more than {RENDER_MEMORY >> 20} MiB."


def _place(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise TokenizerError(f"Chat templates need the package {package}: install it.")
    return Path(spec.origin).parents[1]
