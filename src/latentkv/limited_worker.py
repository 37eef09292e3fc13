"""Runs what strangers wrote in a process of its own that its limits may end at any time.

Run as a file, it knows only the standard library. Its arguments are where tasks are done ("together" in this process,
or each "apart" in a copy of it), the limit on memory in bytes, where packages are found, the file of a worker, and what
that is told at the start: `start(*arguments)` of it returns the function that does a task. It answers the one who holds
the other end of its stdin. A task is 8 bytes of length, 8 bytes of the processor time in seconds that it may take, and
so many bytes. An answer is 8 bytes of length, and so many bytes: + and what the task gives, - and what is wrong with it
in a sentence, or ! (it takes too much memory: this process ends, and another takes its place).
"""

import importlib.util
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable

Do = Callable[[bytes], tuple[bytes, bytes]]

PARENT_SECONDS = 2.0  # after which the process looks whether its parent still lives, in case its end was not seen

_HEAD, _LENGTH = struct.Struct("<Qd"), struct.Struct("<Q")


def _receive(count: int, parent: int) -> bytes:
    """So many bytes of stdin; ends the process when there is nobody to send them."""
    parts: list[bytes] = []
    while count:
        while not select.select([0], [], [], PARENT_SECONDS)[0]:
            if os.getppid() != parent:
                sys.exit()
        part = os.read(0, min(count, 1 << 20))
        if not part:
            sys.exit()
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(how: bytes, content: bytes) -> None:
    left = memoryview(_LENGTH.pack(len(how) + len(content)) + how + content)
    while left:
        left = left[os.write(0, left) :]


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _in_a_copy() -> bool:
    """True in a copy of this process; False here when that has ended well. This process ends as a copy that has not."""
    copy = os.fork()
    if not copy:
        return True
    _, status = os.waitpid(copy, 0)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    elif status:
        sys.exit(1)
    return False


def _load(file: str, arguments: list[str]) -> Do:
    spec = importlib.util.spec_from_file_location("worker", file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.start(*arguments)


def main() -> None:
    """Take tasks until there is nobody to send any."""
    parent = os.getppid()
    apart, memory, places, worker, *arguments = sys.argv[1:]
    sys.path += filter(None, places.split(os.pathsep))
    do = _load(worker, arguments)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, int(memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who is served
    while True:
        length, seconds = _HEAD.unpack(_receive(_HEAD.size, parent))
        task = _receive(length, parent)
        if apart == "apart" and not _in_a_copy():
            continue
        # Its signal is nobody's to catch: it ends the process, wherever in which library the time is spent.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        how, content = do(task)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(how, content)
        if apart == "apart":
            os._exit(0)  # a copy has nothing to put in order
        if how == b"!":
            return


if __name__ == "__main__":
    main()
