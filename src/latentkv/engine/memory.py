"""How much memory a device has left, and how large a cache to make of it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from latentkv.state import LEAST_SLOTS, PAGE_SIZE, SLOTS_SHARE, LayerSpec, page_bytes, sequence_bytes

logger = logging.getLogger("latentkv.engine")

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that `device` could still give: of the GPU, or of main memory (within the control group's limit)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _available()
    limit, used = _read_int(_CGROUP / "memory.max"), _read_int(_CGROUP / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used + _file_cache()))


def beside_weights(free: int, weights: int, model: Path) -> int:
    """What is left of `free` bytes once mapped weights are in memory, an eighth at least; a warning where they do not
    fit, since then parts of them are read from their file again and again.

    Args:
        free: what `free_memory` gives before they are; files in memory count as free there.
        weights: their bytes.
        model: whose they are.
    """
    if weights > free:
        logger.warning(
            "The weights of %s take %.1f GiB, %.1f GiB more than the memory that is free: the rest is read from its "
            "file again at every step, at the disk's speed. Free memory, or quantise the weights (--weights int4).",
            model,
            weights / 2**30,
            (weights - free) / 2**30,
        )
    return max(free - weights, free // 8)


def default_cache_bytes(specs: Sequence[LayerSpec], max_context: int, free: int) -> int:
    """The smaller of one context of `max_context` tokens, in whole pages, and half of `free` bytes.

    Where layers are recurrent it holds slots for their states beside the context.
    """
    pages = -(-max_context // PAGE_SIZE) * page_bytes(specs)
    slot = sequence_bytes(specs)
    slots = max(LEAST_SLOTS * slot, math.ceil(pages * SLOTS_SHARE / (1 - SLOTS_SHARE))) if slot else 0
    return min(pages + slots, free // 2)


def _available() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere the system tells only how much there is.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _file_cache() -> int:
    """Bytes of files not read lately that the control group holds, such as weights once loaded: it drops them first."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read_int(path: Path) -> int | None:
    """The number in a control-group file; None where there is no such file, or no limit in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
