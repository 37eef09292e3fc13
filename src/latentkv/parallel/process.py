"""What torchrun has said to this process, and how a process behaves that is one of several."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

LOOPBACK_VARIABLE = "LATENTKV_LOOPBACK_STORE"
"""Says that the ranks meet at a store of the first one's on the loopback interface, instead of torchrun's."""

_NODES, _TASKS = Path("/sys/devices/system/node"), Path("/proc/self/task")


def world_size() -> int:
    """Processes that torchrun has started together; 1 where it has started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_size() -> int:
    """Of these, those on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_driver() -> bool:
    """Whether this process is the first of them, or the only one."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def share_cores() -> None:
    """Compute on a fair share of this machine's cores, unless somebody has said on how many.

    Where they belong to several memories (sockets), a process keeps to its own: its weights then lie beside it.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":  # which torchrun says unasked
        return
    if not hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(max((os.cpu_count() or 1) // local_size(), 1))
        return
    allowed = os.sched_getaffinity(0)
    torch.set_num_threads(max(len(allowed) // local_size(), 1))
    own = own_cores(allowed, int(os.environ.get("LOCAL_RANK", "0")), local_size(), _NODES)
    if own:
        for thread in _threads():
            with suppress(OSError):  # it has ended meanwhile
                os.sched_setaffinity(thread, own)


def own_cores(allowed: Collection[int], local_rank: int, local_size: int, nodes: Path) -> set[int]:
    """The cores of one of several processes, of as few sockets as can be; none where all cores are of one.

    Args:
        allowed: cores of all of them.
        local_rank: which process.
        local_size: processes on this machine.
        nodes: a folder with a `nodeN/cpulist` for each memory.
    """
    by_node = {path.parent.name: _cores(path.read_text()) & set(allowed) for path in nodes.glob("node*/cpulist")}
    in_order = sorted(by_node, key=lambda name: int(name.removeprefix("node")))
    ordered = [core for name in in_order for core in sorted(by_node[name])]
    each = len(ordered) // local_size
    if sum(map(bool, by_node.values())) < 2 or local_size == 1 or not each:
        return set()
    return set(ordered[local_rank * each : (local_rank + 1) * each])


def _cores(text: str) -> set[int]:
    """Of a list like "0-3,8-11"."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {core for first, *last in ranges for core in range(int(first), int(last[0] if last else first) + 1)}


def _threads() -> list[int]:
    """Of this process, those that torch has begun among them."""
    return [int(path.name) for path in _TASKS.iterdir()] if _TASKS.exists() else [0]


def prepare_process() -> None:
    """Take a fair share of this machine's cores, and leave signals to the driver, who tells the others when to end."""
    share_cores()
    if not is_driver() and threading.current_thread() is threading.main_thread():
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Go on: the driver answers what is open, and then says that it is the end. Before all have met, there is none."""
    if not dist.is_initialized():
        os._exit(128 + number)
