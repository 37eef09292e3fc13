"""`PagePool`: which pages are free and how many sequences hold each of the others. It knows numbers, not memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from latentkv.errors import CacheError


class PagePool:
    """Reference-counted page numbers 0 .. num_pages - 1.

    A page is free xor held: free pages have a count of 0 and wait in a queue; a held page counts its holders and
    returns to the queue when the last one frees it. A free page may be *kept*: its content is worth finding again.
    Pages that are not kept are reused first, then the kept ones, first freed first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise CacheError(f"a page pool of {num_pages} pages can hold nothing: ask for at least one page")
        self._counts = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._kept: dict[int, Callable[[int], None]] = {}

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._counts)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def kept_pages(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._kept.keys() & self._free.keys())

    def holders(self, page: int) -> int:
        """How many times `page` is held (0: free)."""
        self._require_known(page)
        return self._counts[page]

    def allocate(self, n: int) -> list[int]:
        """Take `n` free pages, each held once. All or none. Who kept one of them is told that its content is lost.

        Raises:
            CacheError: fewer than `n` pages are free.
        """
        if n < 0:
            raise CacheError(f"{n} cache pages were asked for: the number cannot be negative")
        if n > len(self._free):
            raise CacheError(
                f"the cache is full: {n} pages were asked for and {len(self._free)} of {self.num_pages} are free; "
                "raise kv_cache_bytes, or use a smaller context or fewer sequences at once"
            )
        pages = [self._free.popitem(last=False)[0] for _ in range(n)]
        for page in pages:
            self._counts[page] = 1
            lost = self._kept.pop(page, None)
            if lost:
                lost(page)
        return pages

    def keep(self, page: int, lost: Callable[[int], None]) -> None:
        """Reuse `page`, once free, as late as can be; `lost(page)` is called when it is.

        Raises:
            CacheError: the page does not exist or is free.
        """
        self._require_held(page, "kept")
        self._kept[page] = lost

    def drop(self, page: int) -> Callable[[int], None] | None:
        """Keep `page` no longer: it is reused first once it is free. Returns what was to be told, which is not."""
        self._require_known(page)
        lost = self._kept.pop(page, None)
        if lost and page in self._free:
            self._free.move_to_end(page, last=False)
        return lost

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of `pages` once more, for one more sequence that reads them; a kept one may be free until now.

        Raises:
            CacheError: a page does not exist, or is free and not kept; then no count has changed.
        """
        pages = list(pages)
        for page in pages:
            if page not in self._kept:
                self._require_held(page, "shared")
        for page in pages:
            self._counts[page] += 1
            self._free.pop(page, None)

    def free(self, pages: Iterable[int]) -> None:
        """Let go of each of `pages` once.

        Raises:
            CacheError: a page does not exist, or is freed more often than it is held; then no count has changed.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            self._require_held(page, "freed", times)
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free[page] = None
                if page not in self._kept:
                    self._free.move_to_end(page, last=False)

    def check(self) -> None:
        """Prove that every page is free xor held and that the counts add up.

        Raises:
            CacheError: an invariant is broken; the message names the page.
        """
        free = set(self._free)
        for page, count in enumerate(self._counts):
            if count < 0 or (count == 0) != (page in free):
                state = "in" if page in free else "not in"
                raise CacheError(
                    f"the page pool is inconsistent: page {page} has {count} holders and is {state} the free queue"
                )
        if not free <= set(range(self.num_pages)):
            raise CacheError(f"the page pool is inconsistent: it lists a page outside 0..{self.num_pages - 1} as free")

    def _require_known(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise CacheError(f"page {page} does not exist: this pool has pages 0..{self.num_pages - 1}")

    def _require_held(self, page: int, what: str, times: int = 1) -> None:
        self._require_known(page)
        if self._counts[page] < times:
            held = self._counts[page]
            raise CacheError(f"page {page} cannot be {what} {times} time(s): it is held {held} time(s)")
