"""`PackedFolder`: the folder where packed weights are kept between starts, those used last up to a size."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from latentkv.errors import CacheError
from latentkv.files import lock, open_regular, sync
from latentkv.weights.packed_file import DamagedPackedFileError, PackedFile, PackedFileWriter

logger = logging.getLogger("latentkv.weights")

_FILE = re.compile(r"[0-9a-f]{64}\.packed")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.partial")


class NoRoomError(Exception):
    """The folder may not hold as much as was to be written."""


@dataclass(frozen=True)
class KeptFile:
    """A file in the folder: its path, when it was last used (nanoseconds since 1970), its bytes."""

    path: Path
    used: int
    size: int


class PackedFolder:
    """Files of packed weights, each under the key that says what it is of. Files of other names are left alone.

    Any number of processes may use a folder: files come whole, by renaming, and one that is removed stays with those
    who have mapped it. What lies here decides what models say, so only its owner may write to it.

    Args:
        path: made if it is missing, for its owner alone.
        max_bytes: that all files may take; None: half of what is free on its disk and theirs already.

    Raises:
        CacheError: it is another user's, or others may write to it.
        OSError: it cannot be made or looked at.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(path)
        self.path = path
        self._max_bytes = max_bytes

    def files(self) -> list[KeptFile]:
        """What is kept, the file not used for longest first.

        Raises:
            OSError: the folder cannot be listed.
        """
        found: list[KeptFile] = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # removed in this moment
                        state = entry.stat(follow_symlinks=False)
                        found.append(KeptFile(Path(entry), state.st_mtime_ns, state.st_size))
        return sorted(found, key=lambda kept: kept.used)

    def find(self, key: bytes) -> PackedFile | None:
        """The file under a key, mapped; None where there is none, or none that can be used. It counts as used now.

        Raises:
            OSError: it cannot be read or mapped.
        """
        path = self._path(key)
        try:
            with FileIO(str(path), opener=open_regular) as file:
                state = os.fstat(file.fileno())
                if hasattr(os, "geteuid") and (state.st_uid != os.geteuid() or state.st_mode & 0o022):
                    raise DamagedPackedFileError("others may have written it")
                found = PackedFile(file, key)
                with suppress(OSError):  # a folder that may only be read
                    os.utime(file.fileno() if os.utime in os.supports_fd else path)
                return found
        except FileNotFoundError:
            return None
        except DamagedPackedFileError as error:
            self.refuse(key, error)
            return None

    def refuse(self, key: bytes, error: Exception) -> None:
        """Say that the file under a key is of no use, and remove it."""
        logger.warning("%s is not used, and packed anew: %s.", self._path(key), error)
        with suppress(OSError):
            self._path(key).unlink()

    @contextmanager
    def writing(self, key: bytes) -> Generator[PackedFileWriter]:
        """Write the file under a key; it is there once the block ends, whole, and not at all if the block raises.

        Files not used for longest go as it grows.

        Raises:
            NoRoomError: it would take more than all files may.
            OSError: it cannot be written.
        """
        self._remove_unfinished()
        path, most = self._path(key), self.most_bytes()
        temporary = self.path / f".{key.hex()}.{secrets.token_hex(8)}.partial"
        try:
            with FileIO(str(temporary), "x", opener=open_regular) as file:
                lock(file.fileno(), otherwise=False)
                writer = PackedFileWriter(file, key, lambda size: self._make_room(size, most, beside=path))
                yield writer
                writer.finish()
                os.fsync(file.fileno())
                temporary.replace(path)
            with suppress(OSError):  # not every system syncs folders
                sync(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def most_bytes(self) -> int:
        """That all files may take.

        Raises:
            OSError: the folder cannot be looked at.
        """
        if self._max_bytes is not None:
            return self._max_bytes
        return (shutil.disk_usage(self.path).free + sum(kept.size for kept in self.files())) // 2

    def _make_room(self, size: int, most: int, *, beside: Path) -> None:
        """Remove files until one of `size` bytes fits in; not `beside`, in whose place it comes."""
        if size > most:
            raise NoRoomError(f"they take more than the {most:,} bytes that {self.path} may hold")
        others = [kept for kept in self.files() if kept.path != beside]
        taken = sum(kept.size for kept in others)
        for kept in others:
            if taken + size <= most:
                return
            kept.path.unlink(missing_ok=True)
            taken -= kept.size

    def _path(self, key: bytes) -> Path:
        return self.path / f"{key.hex()}.packed"

    def _remove_unfinished(self) -> None:
        """Remove what a process that was killed has left half-written; those that write hold a lock."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _PARTIAL.fullmatch(entry.name):
                    with suppress(OSError), FileIO(entry.path, opener=open_regular) as file:
                        if lock(file.fileno(), otherwise=False):
                            Path(entry).unlink()


def _require_own(path: Path) -> None:
    """Refuse a folder into which others could put what models then say."""
    if not hasattr(os, "geteuid"):
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise CacheError(f"packed_dir={str(path)!r} belongs to another user: name a folder of your own.")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise CacheError(
            f"packed_dir={str(path)!r} can be written by other users, who could put other weights there: close it by "
            f"chmod go-w {shlex.quote(str(path))}, or name another folder."
        )
