"""What a report says of the run that made it."""

from __future__ import annotations

import shlex
import sys
from typing import Any


def run_facts(processes: int = 1) -> dict[str, Any]:
    """For the report: the command, the machine and versions it runs on, and in how many processes if in several."""
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from latentkv.bench.environment import describe_environment

    try:
        own = version("latentkv")
    except PackageNotFoundError:  # run from its source
        own = None
    environment = {"latentkv": own} | asdict(describe_environment(torch.get_num_threads()))
    if processes > 1:
        environment["processes"] = processes
    return {"command": shlex.join(["latentkv", *sys.argv[1:]]), "environment": environment}
