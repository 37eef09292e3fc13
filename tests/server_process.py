"""`latentkv serve` as people run it: a process of its own."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

COMMAND = [sys.executable, "-c", "from latentkv.cli.app import main; main()", "serve", "--port", "0"]

# Importing takes longer than most tests: servers are copies of one process that has imported all they need.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["latentkv.cli.app", "latentkv.llm", "latentkv.server.run"])


class ForkedProcess:
    """A `latentkv` command in a process that did not have to import anything; behaves as a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        reader, writer = multiprocessing.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_run, args=(list(arguments), writer), daemon=True)
        self._process.start()
        writer.close()
        self.pid = self._process.pid or 0
        self.stderr = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("latentkv", timeout or 0)
        return self._process.exitcode

    def send_signal(self, sign: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], stderr: Connection) -> None:
    from latentkv.cli.app import main

    os.dup2(stderr.fileno(), 2)
    stderr.close()
    sys.argv[1:] = arguments
    main()


@dataclass
class ServerProcess:
    process: subprocess.Popen[str] | ForkedProcess
    port: int
    lines: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 30) -> tuple[int, Any]:
        """(status, JSON body; of a stream its text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until no request holds a page."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.ask("GET", "/stats")[1]
            if stats["cache"]["used_tokens"] == 0 and stats["requests"]["running"] == stats["requests"]["waiting"] == 0:
                return
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)


@contextmanager
def server_process(
    *arguments: str, command: Sequence[str] | None = None, seconds: float = 120
) -> Generator[ServerProcess]:
    """A server that has begun to serve; killed at the end if it still runs.

    Args:
        arguments: of `latentkv serve`.
        command: that takes them, for a process that begins with nothing.
        seconds: after which it must have begun.
    """
    if command is None:
        process = ForkedProcess(["serve", "--port", "0", *arguments])
    else:
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
    try:
        deadline = time.monotonic() + seconds
        while not (found := re.search(r"on http://\S+?:(\d+)", "".join(lines))):
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.02)
        server = ServerProcess(process, int(found[1]), lines)
        while True:
            try:
                server.ask("GET", "/health")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
                time.sleep(0.02)
        yield server
    finally:
        process.kill()
        process.wait()
