"""What torchrun has said to this process, and how a process behaves that is one of several."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

LOOPBACK_VARIABLE = "LATENTKV_LOOPBACK_STORE"
"""Says that the ranks meet at a store of the first one's on the loopback interface, instead of torchrun's."""


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
    """Compute on a fair share of this machine's cores, unless somebody has said on how many."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # which torchrun says unasked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // local_size(), 1))


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
