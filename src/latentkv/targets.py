"""Folders to write to, looked at before the work whose result they are to hold."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from latentkv.errors import LatentKVError


def require_folder(folder: Path, error: type[LatentKVError], *, apart: Sequence[tuple[str, Path]] = ()) -> None:
    """Refuse what no folder can be made of, or written to; nothing is left there.

    Args:
        folder: that exists, or is to be made.
        error: the type that is raised.
        apart: (what it is, path) of folders that are read and must not be written to.

    Raises:
        LatentKVError: of type `error`: there is a file or a dead link in the way, writing is not allowed, or the folder
            is one of `apart`.
    """
    try:
        for what, path in apart:
            if folder.exists() and path.exists() and folder.samefile(path):
                raise error(f"{folder} is {what} itself: name another folder.")
        nearest = folder
        while not nearest.exists():
            if nearest.is_symlink():
                raise error(f"{nearest} is a link that leads nowhere: name another folder.")
            nearest = nearest.parent
        if not nearest.is_dir():
            raise error(f"{nearest} is a file, not a folder: name another folder.")
        # Asked of the system by doing it: permissions do not tell of disks that are read-only.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as problem:
        raise error(f"{folder} cannot be written ({problem.strerror or problem}): name another folder.") from problem
