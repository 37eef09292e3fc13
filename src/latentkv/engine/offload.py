"""`Offload`: prefixes that go to a store of files and come back, beside the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Semaphore

from latentkv.engine.counters import Counters
from latentkv.engine.loading import Loading
from latentkv.engine.sequence import Sequence
from latentkv.state import KnownPage, PageKey, PageStore, PrefixIndex, Slot

MIN_PAGES = 4
"""Pages of a prefix that is worth a file a page."""

QUEUE_BYTES = 1 << 28
"""Of pages that wait to be written; further ones are offered again later."""

REST_SECONDS = 60.0
"""After the folder could not be written, before it is tried again."""

logger = logging.getLogger("latentkv.engine")


@dataclass
class _Stored:
    """A sequence, as the store sees it.

    Attributes:
        salt: whose prefixes it shares.
        keys: of its first full pages.
        num_offered: how many of its known pages were given to be written.
        loading: pages after the known ones that are being read; until then it takes part in no step.
    """

    salt: str
    keys: list[PageKey] = field(default_factory=list[PageKey])
    num_offered: int = 0
    loading: Loading | None = None


class Offload:
    """Stores the pages of prefixes as they become known, and reads them back for sequences that begin with them.

    Where layers are recurrent, snapshots of their states are stored with the pages, and pages are read up to one.

    Two threads do so. The engine's own never waits for the disk, but for a page at most where a sequence is given up
    while its pages are read. Nothing that a disk does ends a request.

    Args:
        store: where pages go; it is closed with this.
        prefixes: the pages in memory.
        counters: to be kept.
    """

    def __init__(self, store: PageStore, prefixes: PrefixIndex, counters: Counters) -> None:
        self._store = store
        self._prefixes = prefixes
        self._page_size = store.page_size
        self._counters = counters
        self._reader = ThreadPoolExecutor(1, "latentkv-store-reader")
        self._writer = ThreadPoolExecutor(1, "latentkv-store-writer")
        self._queue = Semaphore(max(QUEUE_BYTES // store.page_bytes, 2 * MIN_PAGES))
        self._rests_until = 0.0
        self._stored: dict[Sequence, _Stored] = {}

    def begin(self, sequence: Sequence, salt: str, known: int) -> None:
        """Begin to read what is stored of a sequence that was admitted.

        Args:
            sequence: it has pages for all of its tokens.
            salt: whose prefixes it shares.
            known: its first pages, which need not be read.
        """
        stored = self._stored[sequence] = _Stored(salt)
        wanted = (len(sequence.tokens) - 1) // self._page_size  # the newest token is read by the model
        keys = [self._key(sequence, index) for index in range(known)]
        while len(keys) < wanted and (key := self._key(sequence, len(keys))) in self._store:
            keys.append(key)
        slot = sequence.slot
        while slot and len(keys) > known and self._store.snapshot_key(keys[-1]) is None:
            keys.pop()
        self._counters.store_queries += (wanted - known) * self._page_size
        if len(keys) > known:
            pages = sequence.pages[known : len(keys)]
            stored.loading = Loading(self._reader, lambda is_wanted: self._load(keys, pages, slot, is_wanted))
        elif keys:
            self._submit(lambda: self._touch(keys))

    def finish(self, sequence: Sequence) -> bool:
        """Count as cached what was read for a sequence; False: it is not done yet."""
        stored = self._stored.get(sequence)
        if stored is None or stored.loading is None or not stored.loading.done:
            return False
        pages, stored.loading = stored.loading.pages(), None
        sequence.num_cached += pages * self._page_size
        if not sequence.times_given_back:
            sequence.num_found = sequence.num_cached
        self._counters.store_hits += pages * self._page_size
        self._counters.loaded_bytes += pages * self._store.page_bytes
        return True

    def is_loading(self, sequence: Sequence) -> bool:
        """Whether pages of a sequence are being read."""
        stored = self._stored.get(sequence)
        return stored is not None and stored.loading is not None

    def wait_for_loading(self, seconds: float) -> bool:
        """Wait, at most so long, until the pages of some sequence are read; False: none are being read."""
        loadings = [stored.loading for stored in self._stored.values() if stored.loading]
        if loadings:
            Loading.wait_for_any(loadings, seconds)
        return bool(loadings)

    def save(self, sequence: Sequence, known: list[KnownPage]) -> None:
        """Have the known pages of a sequence written that are not stored yet, as far as the queue has room."""
        if len(known) < MIN_PAGES or time.monotonic() < self._rests_until:
            return
        stored = self._stored[sequence]
        while stored.num_offered < len(known):
            key = self._key(sequence, stored.num_offered)
            if key not in self._store and not self._offer(key, known[stored.num_offered]):
                return
            stored.num_offered += 1

    def save_snapshots(self, sequence: Sequence, known: list[KnownPage]) -> None:
        """Have the snapshots at the ends of its known pages written that are not stored yet, after these."""
        if time.monotonic() < self._rests_until:
            return
        for index, page in enumerate(known):
            snapshot = self._prefixes.snapshot(page)
            if snapshot and index < self._stored[sequence].num_offered:
                key = self._key(sequence, index)
                if self._store.snapshot_key(key) is None and not self._offer_snapshot(key, page, snapshot):
                    return

    def forget(self, sequence: Sequence) -> None:
        """A sequence is about to give its pages back: none is written to any more."""
        stored = self._stored.pop(sequence, None)
        if stored and stored.loading:
            stored.loading.stop()

    def close(self) -> None:
        """Read no more, write what waits to be written, and let another process write."""
        for sequence in list(self._stored):
            self.forget(sequence)
        self._reader.shutdown()
        self._writer.shutdown()
        self._store.close()

    def _key(self, sequence: Sequence, index: int) -> PageKey:
        """Of a full page of a sequence."""
        stored = self._stored[sequence]
        keys = stored.keys
        while len(keys) <= index:
            tokens = sequence.tokens[len(keys) * self._page_size : (len(keys) + 1) * self._page_size]
            keys.append(keys[-1].next(tokens) if keys else self._store.first_key(stored.salt, tokens))
        return keys[index]

    def _offer(self, key: PageKey, known: KnownPage) -> bool:
        return self._submit(
            lambda: self._save(lambda: self._store.save(key, known.page, lambda: self._prefixes.holds(known)))
        )

    def _offer_snapshot(self, key: PageKey, page: KnownPage, snapshot: Slot) -> bool:
        def is_valid() -> bool:
            return self._prefixes.snapshot(page) is snapshot

        return self._submit(lambda: self._save(lambda: self._store.save_snapshot(key, snapshot, is_valid)))

    def _submit(self, work: Callable[[], None]) -> bool:
        """Let the writer's thread do something, unless too much waits for it."""
        if not self._queue.acquire(blocking=False):
            return False
        self._writer.submit(self._guarded, work)
        return True

    # What follows runs in the two threads.

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            logger.exception("pages could not be stored")
        finally:
            self._queue.release()

    def _save(self, save: Callable[[], int]) -> None:
        if time.monotonic() < self._rests_until:
            return
        try:
            self._counters.stored_bytes += save()
        except OSError as error:
            self._rests_until = time.monotonic() + REST_SECONDS
            self._store.warn_once(
                "unwritable",
                f"Pages cannot be written to {self._store.folder} ({error.strerror}): prefixes stay in memory only, "
                "until that changes.",
            )

    def _touch(self, keys: list[PageKey]) -> None:
        snapshot = self._store.snapshot_key(keys[-1])
        self._store.touch(keys if snapshot is None else [*keys, snapshot])

    def _load(self, keys: list[PageKey], pages: list[int], slot: Slot | None, is_wanted: Callable[[], bool]) -> int:
        known = len(keys) - len(pages)
        try:
            loaded = self._store.load(keys[known:], pages, is_wanted)
            if slot and (loaded < len(pages) or not self._store.load_snapshot(keys[-1], slot)):
                return 0
            if known + loaded:
                self._touch(keys[: known + loaded])
        except Exception:
            logger.exception("stored pages could not be read")
            return 0
        return loaded
