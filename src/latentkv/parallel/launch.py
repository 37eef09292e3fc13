"""`launch`: this program again as several processes of this machine, started and watched by torch's own means."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from latentkv.errors import RankError
from latentkv.parallel.process import LOOPBACK_VARIABLE

_LOOK_SECONDS = 0.1
_SIGNALS = "SIGTERM,SIGHUP,SIGQUIT"


def launch(size: int, arguments: Sequence[str], *, end_seconds: float) -> int:
    """Run `python -m latentkv` with these arguments in `size` processes, until all have ended.

    Nothing of them can be reached from other machines: they meet at a store on the loopback interface. SIGTERM is
    passed on to them; Ctrl-C reaches them from the terminal, as it does this process, which leaves it to them.

    Args:
        size: processes.
        arguments: of each.
        end_seconds: that they may take to end after a signal, before they are killed.

    Returns:
        The exit code of the process that failed first; 0 where none did.

    Raises:
        RankError: one of them was killed.
    """
    # It says of each process that fails where its traceback is not.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    signal.signal(signal.SIGINT, _leave_to_processes)
    with TemporaryDirectory(prefix="latentkv-") as logs:
        processes = start_processes(
            "latentkv",
            sys.executable,
            args=dict.fromkeys(range(size), ("-m", "latentkv", *arguments)),
            envs=dict(enumerate(_environments(size))),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            result = processes.wait(period=_LOOK_SECONDS)
        except SignalException as received:
            processes.close(received.sigval, timeout=int(end_seconds))
            return max(abs(code) for code in _exit_codes(processes))
    failures = result.failures if result else {}
    if not failures:
        return 0
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        raise RankError(first.local_rank, f"was killed by signal {-first.exitcode}")
    return first.exitcode


def _environments(size: int) -> list[dict[str, str]]:
    """What torchrun would tell each process, and that they are to meet on the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    together = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), LOOPBACK_VARIABLE: "1"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _exit_codes(processes: PContext) -> list[int]:
    handlers: dict[int, SubprocessHandler] = vars(processes)["subprocess_handlers"]
    return [handler.proc.poll() or 0 for handler in handlers.values()]


def _leave_to_processes(number: int, frame: FrameType | None) -> None:
    """Go on: the processes end by themselves, each as its command does."""
