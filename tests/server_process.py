"""`latentkv serve` as people run it: a process of its own."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from forked_program import MAIN, ForkedProgram

COMMAND = [sys.executable, "-c", MAIN, "serve", "--port", "0"]


@dataclass
class ServerProcess:
    process: subprocess.Popen[str] | ForkedProgram
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
    *arguments: str, command: Sequence[str] | None = None, code: str = MAIN, seconds: float = 120
) -> Generator[ServerProcess]:
    """A server that has begun to serve; killed at the end if it still runs.

    Args:
        arguments: of `latentkv serve`.
        command: that takes them, for a process that begins with nothing.
        code: that takes them in a copy of a process that has imported what it needs.
        seconds: after which it must have begun.
    """
    if command is None:
        process = ForkedProgram(code, "serve", "--port", "0", *arguments)
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
