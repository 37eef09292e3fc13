"""`StoreFolder`: a folder that processes share: its secret, its lock, its page files."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

from latentkv.errors import CacheError
from latentkv.files import lock, open_regular, sync
from latentkv.state.store.stored_files import StoredFile, in_blocks

SECRET_BYTES = 32

_PAGE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.(page|state)")
_PARTIAL = re.compile(rf"\.{_PAGE.pattern}\.partial")


class StoreFolder:
    """Where page files lie. Files of other names are none of its business.

    One process at a time, the one that holds the lock, makes and removes page files; all may read them. The lock ends
    with its process, however that ends.

    Args:
        path: made if it is missing, for its owner's eyes only.

    Attributes:
        secret: made once for each folder; names of files cannot be guessed without it.

    Raises:
        CacheError: it cannot be made or read, is another user's, or is open to others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(path)
            self.secret = self._read_secret()
        except OSError as error:
            raise CacheError(
                f"cache_dir={str(path)!r} cannot be used ({error.strerror}): name a folder that can be written."
            ) from error
        self._lock: FileIO | None = None

    def lock(self) -> bool:
        """Become the one process that writes, unless another one is."""
        if self._lock is None:
            with suppress(OSError):  # read-only
                file = FileIO(self.path / "lock", "a", opener=open_private)
                if lock(file.fileno(), otherwise=False):
                    self._lock = file
                else:
                    file.close()
        return self._lock is not None

    def require_same(self) -> None:
        """Raise `OSError` unless the lock that this process holds is still that of the folder at `path`.

        The folder may be gone, and another in its place, which other processes lock.
        """
        if self._lock is None or not os.path.samestat(os.fstat(self._lock.fileno()), (self.path / "lock").stat()):
            raise FileNotFoundError(errno.ENOENT, "another folder has taken its place", str(self.path))

    def unlock(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def files(self) -> Iterator[StoredFile]:
        """The page files that lie here.

        Raises:
            OSError: they cannot be listed.
        """
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _PAGE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # removed in this moment
                        found = entry.stat(follow_symlinks=False)
                        if not stat.S_ISREG(found.st_mode):
                            continue
                        yield StoredFile(entry.name, found.st_mtime_ns, in_blocks(found.st_size))

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed has left half-written; only who holds the lock may."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if _PARTIAL.fullmatch(entry.name):
                    Path(entry).unlink(missing_ok=True)

    def _read_secret(self) -> bytes:
        path = self.path / "secret"
        with suppress(FileNotFoundError):
            with FileIO(str(path), opener=open_regular) as file:
                secret = file.read(SECRET_BYTES + 1)
            if len(secret) == SECRET_BYTES:
                return secret
            path.unlink(missing_ok=True)
        temporary = self.path / f".secret.{os.getpid()}.{secrets.token_hex(8)}"
        try:
            with FileIO(temporary, "x", opener=open_private) as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
            sync(temporary)
            with suppress(FileExistsError):  # another process was quicker: its secret is everyone's
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_bytes()


def _require_private(path: Path) -> None:
    """Refuse a folder in which others could read what was prompted, or put what is then believed."""
    if not hasattr(os, "geteuid"):
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise CacheError(f"cache_dir={str(path)!r} belongs to another user: name a folder of your own.")
    if found.st_mode & 0o077:
        raise CacheError(
            f"cache_dir={str(path)!r} is open to other users, and would hold what was prompted: close it by "
            f"chmod 700 {shlex.quote(str(path))}, or name another folder."
        )


def open_private(path: str, flags: int) -> int:
    """Opener of regular files that only their owner may read: they hold what people wrote."""
    return open_regular(path, flags)
