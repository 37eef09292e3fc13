"""`team_file`: memory that the ranks of a stage share."""

from __future__ import annotations

import os

from latentkv.errors import ConfigError
from latentkv.parallel.ranks import Ranks


def team_file(ranks: Ranks, what: str, num_bytes: int) -> int:
    """Zeroed memory that all ranks of this one's team can map, as the descriptor of a file; close it once it is mapped.

    It has no name that could be left behind: it is gone with the last of the processes.

    Args:
        ranks: of the team, all of which call this.
        what: the memory is for.
        num_bytes: of it; what nobody writes to takes no room.

    Raises:
        ConfigError: another process's memory cannot be opened.
        RankError: another rank has ended.
    """
    leader, key = ranks.team[0], f"memory of {what}"
    if ranks.rank == leader:
        file = os.memfd_create(f"latentkv-{what}", os.MFD_CLOEXEC)
        os.ftruncate(file, num_bytes)
        ranks.tell(key, {"path": f"/proc/{os.getpid()}/fd/{file}"})
        for rank in ranks.team[1:]:
            ranks.hear(f"opened {key}", rank)
        return file
    path = ranks.hear(key, leader)["path"]
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"Rank {ranks.rank} cannot share memory with rank {leader} ({path}: {error.strerror}): run both as "
            "one user in one container, or use pipeline_parallel."
        ) from error
    ranks.tell(f"opened {key}", {})
    return file
