"""Where a measurement was taken: without this a number means nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from latentkv.kernels import current_backend

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Environment:
    """The machine and the software.

    Attributes:
        cpu: its name.
        threads: torch threads that the measurement used.
        kernels: the instruction set of LatentKV's kernels, or "torch", or "triton".
        load_before: programs that wanted to run in the minute before, this one included; well above 1, the machine was
            busy with something else and the measurement suffers.
        python: version.
        torch: version.
        transformers: version, None where it is not installed.
    """

    cpu: str
    threads: int
    kernels: str
    load_before: float
    python: str
    torch: str
    transformers: str | None


def describe_environment(threads: int) -> Environment:
    """What is here; called before measuring with `threads` torch threads."""
    return Environment(
        cpu=cpu_name(),
        threads=threads,
        kernels=current_backend(),
        load_before=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=_version_or_none("transformers"),
    )


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What this machine's processor calls itself."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
