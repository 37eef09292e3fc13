"""`PageStore`: what a cache holds as files of a folder, found again by the text in them, also after a restart."""

from __future__ import annotations

import hmac
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path

from latentkv.errors import CacheError
from latentkv.files import open_regular
from latentkv.state.cache import PagedCache
from latentkv.state.slots import Slot
from latentkv.state.spec import LayerSpec
from latentkv.state.store.folder import StoreFolder, open_private
from latentkv.state.store.page_file import VERSION, DamagedPageError, file_bytes, read_page, write_page
from latentkv.state.store.page_key import PageKey
from latentkv.state.store.stored_files import StoredFile, StoredFiles, in_blocks

logger = logging.getLogger("latentkv.state")

_AHEAD = 16
"""Files that the system is told to read before they are needed: a disk serves several at once."""

_STEP = 1000
"""Nanoseconds by which a page counts as used before the one it follows: of a text the end is removed first."""


class PageStore:
    """Full pages of a cache in a folder, each in a file of its own, and snapshots of recurrent states likewise.

    A page is found by its `PageKey`; what its file says is compared with that before it is believed. Files are
    removed, those not used for longest first, and of a text its end, so that all page files in the folder (those of
    other models too) take at most `max_bytes`. Any number of processes may use a folder: one at a time writes, the
    others read; when it ends another one does. `save` is for one thread, the rest for any.

    Nothing is synced to the disk. A file that a crash leaves damaged is recognised, and what it held can be computed.

    Args:
        folder: where the files lie.
        max_bytes: of all page files, in whole blocks of 4 KiB.
        fingerprint: of the model; whatever changes the numbers in its pages must change it.
        cache: whose pages are stored, in main memory.

    Raises:
        CacheError: the folder cannot be used, not even one page fits, or the cache lies on a GPU.
    """

    def __init__(self, folder: StoreFolder, max_bytes: int, fingerprint: bytes, cache: PagedCache) -> None:
        if not all(tensor.is_cpu for tensor in cache.storage):
            raise CacheError("A GPU's cache cannot be stored in files: leave cache_dir out, or use device='cpu'.")
        least = in_blocks(file_bytes(cache.page_size, cache.kept_page_bytes))
        if cache.slots:
            least += in_blocks(file_bytes(1, cache.sequence_bytes))
        if least > max_bytes:
            what = "page with a snapshot" if cache.slots else "page"
            raise CacheError(
                f"cache_dir_bytes={max_bytes:,} holds no {what}: give at least {least:,}, or leave cache_dir out."
            )
        self.max_bytes = max_bytes
        self._cache = cache
        self._folder = folder
        self._model = hmac.digest(
            self._folder.secret, repr((VERSION, fingerprint, _stored_of(cache), cache.page_size)).encode(), "sha256"
        )
        self._prefix = self._model[:8].hex() + "-"
        self._guard = threading.Lock()  # of the files known
        self._files = StoredFiles()
        self._warned: set[str] = set()
        self._writes = False
        try:
            self._look()
            self._may_write()
        except OSError as error:
            raise CacheError(
                f"cache_dir={str(folder.path)!r} cannot be used ({error.strerror}): name a folder that can be written."
            ) from error

    def __contains__(self, key: PageKey) -> bool:
        """Whether a page is stored, as far as this process knows."""
        return self._name(key) in self._files

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._folder.path

    def path(self, key: PageKey) -> Path:
        """The file of a page, if it is stored."""
        return self.folder / self._name(key)

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._cache.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's state."""
        return self._cache.kept_page_bytes

    @property
    def num_pages(self) -> int:
        """Pages of this model that are known."""
        with self._guard:
            return sum(file.name.endswith(".page") for file in self._files.starting_with(self._prefix))

    @property
    def total_bytes(self) -> int:
        """Bytes of all page files that are known, those of other models too."""
        return self._files.total_bytes

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self._writes

    def first_key(self, salt: str, tokens: Sequence[int]) -> PageKey:
        """The key of the page that a text of `salt` begins with; `PageKey.next` gives the others.

        A salt enters a hash that is keyed with the folder's secret, and is not written anywhere.
        """
        return PageKey.first(hmac.digest(self._model, salt.encode(), "sha256"), tokens)

    def save(self, key: PageKey, page: int, is_valid: Callable[[], bool]) -> int:
        """Store the content of a page.

        The page need not be held: it is written as it is, and what was written counts only if the page is valid still.

        Args:
            key: what the page holds.
            page: its number.
            is_valid: whether it still does.

        Returns:
            Bytes written. 0: it is stored already, is not valid any more, does not follow a stored page, is not used
            more recently than what would make room for it, or another process is the one that writes.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        return self._save(key, self._cache.page_parts(page), is_valid)

    def save_snapshot(self, key: PageKey, slot: Slot, is_valid: Callable[[], bool]) -> int:
        """Store a snapshot of recurrent states, as `save` does a page.

        Args:
            key: of the page at whose end it is.
            slot: where it lies.
            is_valid: whether it still does.

        Returns:
            As `save`.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        waiting = (key.depth + 1) * self.page_size - slot.num_tokens
        return self._save(key.snapshot(waiting), self._cache.slot_parts(slot, waiting), is_valid)

    def snapshot_key(self, key: PageKey) -> PageKey | None:
        """The key of the stored snapshot at the end of a page, as far as this process knows; None: there is none."""
        keys = map(key.snapshot, range(self._cache.most_drafted + 1))
        return next((each for each in keys if each in self), None)

    def _save(self, key: PageKey, parts: list[memoryview], is_valid: Callable[[], bool]) -> int:
        name, size = self._name(key), file_bytes(len(key.tokens) // 4, sum(part.nbytes for part in parts))
        if name in self._files or not is_valid() or not self._may_write():
            return 0
        used = self._use_of_next(key)
        if used is None or not self._make_room(in_blocks(size), used):
            return 0
        path, temporary = self.folder / name, self.folder / f".{name}.partial"
        try:
            with FileIO(temporary, "w", opener=open_private) as file:
                write_page(file, key, parts)
                os.utime(file.fileno(), ns=(used, used))
            if not is_valid():
                return 0
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._guard:
            self._files.put(StoredFile(name, used, in_blocks(size)))
        return size

    def load(self, keys: Sequence[PageKey], pages: Sequence[int], is_wanted: Callable[[], bool]) -> int:
        """Read stored pages, up to the first that cannot be had.

        Args:
            keys: of pages that follow each other.
            pages: the numbers of held pages that get their content; those that get none hold anything afterwards.
            is_wanted: asked before each page; False ends it.

        Returns:
            How many pages, from the first on, now hold what their keys say.
        """
        opened: deque[FileIO | None] = deque()
        upcoming = iter(keys)
        try:
            for done, (key, page) in enumerate(zip(keys, pages, strict=True)):
                while len(opened) < _AHEAD and (next_key := next(upcoming, None)) is not None:
                    opened.append(self._open(next_key))
                file = opened.popleft()
                if file is None or not is_wanted() or not self._read(file, key, self._cache.page_parts(page)):
                    return done
            return len(keys)
        finally:
            for file in opened:
                if file is not None:
                    file.close()

    def load_snapshot(self, key: PageKey, slot: Slot) -> bool:
        """Read the stored snapshot at the end of a page into a held slot.

        Args:
            key: of the page.
            slot: where it goes.

        Returns:
            Whether it could be had; if not, the slot is as it was.
        """
        for waiting in range(self._cache.most_drafted + 1):
            own = key.snapshot(waiting)
            file = self._open(own) if own in self else None
            into = self._cache.slot_parts(slot, waiting)
            read = [memoryview(bytearray(part.nbytes)) for part in into]
            if file is not None and self._read(file, own, read):
                for part, content in zip(into, read, strict=True):
                    part[:] = content
                slot.num_tokens = (key.depth + 1) * self.page_size - waiting
                return True
        return False

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Count the pages of a text, from its first page on, as used now."""
        now = time.time_ns()
        for key in keys:
            file = self._files.get(self._name(key))
            if file is not None:
                used = now - key.depth * _STEP
                with suppress(OSError):  # of a read-only folder; or the file is gone, and found so when it is read
                    os.utime(self.folder / file.name, ns=(used, used))
                with self._guard:
                    if file.name in self._files:
                        self._files.put(replace(file, used=used))

    def warn_once(self, about: str, message: str) -> None:
        """Log `message`, the first time that something is to be said `about` this."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message)

    def close(self) -> None:
        """Let another process write."""
        self._writes = False
        self._folder.unlock()

    def _name(self, key: PageKey) -> str:
        return f"{self._prefix}{key.digest.hex()}.{'state' if key.is_snapshot else 'page'}"

    def _use_of_next(self, key: PageKey) -> int | None:
        """When a page that is stored now counts as used: just before the one it follows; None: that one is missing."""
        if key.depth == 0:
            return time.time_ns()
        before = self._files.get(f"{self._prefix}{key.parent.hex()}.page")
        return None if before is None else before.used - _STEP

    def _open(self, key: PageKey) -> FileIO | None:
        """The file of a page, which the system begins to read; None where there is none any more."""
        try:
            file = FileIO(str(self.path(key)), opener=open_regular)
        except FileNotFoundError:  # another process has removed it
            self._forget(key)
            return None
        except OSError as error:
            self._warn_unreadable(key, error)
            return None
        with suppress(OSError, AttributeError):  # a hint, which not all systems take
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def _read(self, file: FileIO, key: PageKey, parts: list[memoryview]) -> bool:
        try:
            with file:
                read_page(file, key, parts)
        except DamagedPageError as error:
            self._remove_damaged(key, error)
            return False
        except OSError as error:
            self._warn_unreadable(key, error)
            return False
        return True

    def _remove_damaged(self, key: PageKey, error: DamagedPageError) -> None:
        path = self.path(key)
        with suppress(OSError):  # where it cannot be removed it still counts, and is found damaged again
            path.unlink(missing_ok=True)
            self._forget(key)
        self.warn_once("damaged", f"{path} is damaged ({error}); what damaged files held is computed again.")

    def _warn_unreadable(self, key: PageKey, error: OSError) -> None:
        self.warn_once(
            "unreadable",
            f"{self.path(key)} cannot be read ({error.strerror}); what unreadable files held is computed again.",
        )

    def _forget(self, key: PageKey) -> None:
        with self._guard:
            self._files.remove(self._name(key))

    def _may_write(self) -> bool:
        """Whether this process is the one that writes; where nobody is any more, it becomes it.

        Raises:
            OSError: the folder cannot be written, or is not the same any more.
        """
        if self._writes:
            self._folder.require_same()
        elif self._folder.lock():
            self._folder.remove_unfinished()
            self._look()
            self._make_room(0, math.inf)
            self._writes = True
        return self._writes

    def _look(self) -> None:
        """Know the files that are there."""
        files, now = StoredFiles(), time.time_ns()
        for file in self._folder.files():
            files.put(replace(file, used=min(file.used, now)))  # a clock may have been wrong
        with self._guard:
            self._files = files

    def _make_room(self, size: int, used: float) -> bool:
        """Remove the files not used for longest until `size` bytes more fit; none that was used after `used`.

        Returns:
            Whether they fit.
        """
        while self._files.total_bytes + size > self.max_bytes:
            with self._guard:
                oldest = self._files.oldest()
            if oldest is None or oldest.used >= used:
                return False
            self._remove(oldest)
        return True

    def _remove(self, file: StoredFile) -> None:
        """Remove a file, unless another process has used it meanwhile (a time to come says nothing)."""
        path = self.folder / file.name
        with suppress(FileNotFoundError):
            used = path.stat().st_mtime_ns
            if file.used < used <= time.time_ns():
                with self._guard:
                    self._files.put(replace(file, used=used))
                return
            path.unlink()
        with self._guard:
            self._files.remove(file.name)


def _stored_of(cache: PagedCache) -> list[LayerSpec]:
    """What is stored of each layer: it does not depend on how long drafts may be."""
    return [
        replace(spec, recurrent=spec.recurrent and replace(spec.recurrent, most_drafted=0), ring=None)
        for spec in cache.specs
    ]
