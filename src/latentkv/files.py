"""Files: written whole or not at all, read only as far as their size and kind allow."""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's mmap names from 3.13 on."""


def read_bytes(path: Path, error: type[Exception], most_bytes: int) -> bytes:
    """All bytes of a regular file of at most `most_bytes`; nothing is read before kind and size are known.

    Raises:
        Exception: of type `error`, in one sentence: the file is missing, too large, no regular file (a pipe would never
            end), or cannot be read.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path} is no regular file: put the file itself there.")
            if found.st_size > most_bytes:
                raise error(f"{path} has {found.st_size:,} bytes, more than the {most_bytes:,} that it may.")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(found.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path} is a link to {path.readlink()}, which is not there: fetch the file itself.") from None
        raise error(f"{path.parent} has no {path.name}: it is needed.") from None
    except (OSError, ValueError) as reason:  # a name with a null character is a ValueError
        raise error(f"{path} cannot be read ({getattr(reason, 'strerror', None) or reason}).") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`; once that is on disk it gets the name, in place of an older one.

    Raises:
        OSError: the file cannot be written. What was there before is as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opener of regular files: no link is followed, and no pipe or device is waited for.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def lock(descriptor: int, *, otherwise: bool) -> bool:
    """Hold a file's lock as long as it is open; False where another process does.

    Args:
        descriptor: of the open file, or folder.
        otherwise: what is returned where the system, or the disk, has no locks.
    """
    try:
        import fcntl  # POSIX's

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return otherwise
    return True


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_copy_on_write(descriptor: int) -> mmap.mmap:
    """A whole file, which is not empty. Torch takes only memory that may be written to; what is written stays in this
    process.

    Raises:
        OSError: it cannot be mapped.
    """
    if sys.platform != "linux":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    # Nothing is written, so no memory need be promised: the file may be larger than all there is.
    return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
