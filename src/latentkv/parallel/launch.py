"""`launch`: this program again as several processes of this machine, started and watched by torch's own agent."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from uuid import uuid4

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from latentkv.errors import RankError

_LOOK_SECONDS = 0.1


def launch(size: int, arguments: Sequence[str], *, end_seconds: float) -> int | None:
    """Run `python -m latentkv` with these arguments in `size` processes, until all have ended.

    Args:
        size: processes.
        arguments: of each.
        end_seconds: that they may take to end, when this process is told to, before they are killed.

    Returns:
        The exit code of the process that failed first, 0 where none did; None where a signal has ended them.

    Raises:
        RankError: one of them was killed.
    """
    # It says of each process that fails where its traceback is not.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(end_seconds)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=_LOOK_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "latentkv", *arguments)
    except SignalException:
        return None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise RankError(rank, f"was killed by signal {-failure.exitcode}") from None
        return failure.exitcode
    return 0
