"""Programs in processes of their own that have imported already what takes seconds: copies of one that did.

For what only a process can show, but not for what is tested of its start. What a program prints when the interpreter
itself ends, and variables of the environment that libraries read when they are loaded, need a process that starts anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["latentkv.cli.app", "latentkv.llm", "latentkv.server.run"])

MAIN = "from latentkv.cli.app import main; main()"

RETURN_WHAT_IS_FREED = "import ctypes; ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD\n"
"""Begins a program whose memory is counted: what it frees goes back to the system, in blocks of 64 KiB, at once."""


class ForkedProgram:
    """A program that runs; behaves as a `subprocess.Popen` whose three ends are pipes of text.

    Args:
        code: of the program.
        arguments: what it finds in `sys.argv[1:]`.
    """

    def __init__(self, code: str, *arguments: object) -> None:
        into, out, err = (multiprocessing.Pipe(duplex=False) for _ in range(3))
        theirs = [into[0], out[1], err[1]]
        self._process = _FORKS.Process(target=_run, args=(code, [*map(str, arguments)], theirs), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0
        self.stdin = os.fdopen(os.dup(into[1].fileno()), "w", encoding="utf-8")
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), encoding="utf-8") for end in (out[0], err[0]))
        for end in (*into, *out, *err):
            end.close()

    def __enter__(self) -> ForkedProgram:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it still runs."""
        self.kill()
        self.wait()
        for end in (self.stdin, self.stdout, self.stderr):
            end.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0)
        return self._process.exitcode

    def send_signal(self, sign: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        self._process.kill()


def run_forked(code: str, *arguments: object) -> tuple[int, str, str]:
    """(exit code, what it wrote to stdout, to stderr) of a program that says little and is told nothing."""
    with ForkedProgram(code, *arguments) as program:
        program.stdin.close()
        written = program.stdout.read(), program.stderr.read()
        return program.wait(120), *written


def _run(code: str, arguments: list[str], ends: list[Connection]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.argv[1:] = arguments
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
