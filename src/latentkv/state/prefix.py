"""`PrefixIndex`: pages found again by the tokens in them, so that a prompt's known beginning is not read twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from latentkv.state.pages import PagePool
from latentkv.state.slots import Slot, SlotPool

Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class KnownPage:
    """A full page whose content is known.

    Attributes:
        id: never given again, unlike the page's number.
        page: where the tokens' state lies.
    """

    id: int
    page: int


class PrefixIndex:
    """Full pages of a pool, by their tokens and all tokens before them.

    A page is found by (the page before it, its own token ids), compared token by token: no hash is trusted. Texts of
    different salts never meet. A page that nobody holds stays findable until the pool reuses it, and the pages of a
    prefix are reused from its end.

    Where layers are recurrent one can only go on from a page at whose end their state is known, as a snapshot: a prefix
    is found up to the last such page.

    Args:
        pool: of the pages.
        page_size: tokens a page.
        slots: of the snapshots; None where no layer is recurrent.
    """

    def __init__(self, pool: PagePool, page_size: int, slots: SlotPool | None = None) -> None:
        self._pool = pool
        self._page_size = page_size
        self._slots = slots
        self._snapshots: dict[int, Slot] = {}  # by the id of the page at whose end
        self._ids = count()
        self._roots: dict[str, int] = {}
        self._known: dict[Key, KnownPage] = {}
        self._keys: dict[int, Key] = {}  # by page

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._known)

    def find(self, salt: str, tokens: Sequence[int]) -> list[KnownPage]:
        """The known full pages that `tokens` begin with, as far as one can go on from them."""
        found: list[KnownPage] = []
        parent = self._roots.get(salt)
        while parent is not None and (len(found) + 1) * self._page_size <= len(tokens):
            start = len(found) * self._page_size
            known = self._known.get((parent, tuple(tokens[start : start + self._page_size])))
            if known is None:
                break
            found.append(known)
            parent = known.id
        while self._slots and found and found[-1].id not in self._snapshots:
            found.pop()
        return found

    def add(self, salt: str, before: KnownPage | None, tokens: Sequence[int], page: int) -> KnownPage:
        """Make the full `page` of `tokens`, which follows `before` (None: begins a text), findable.

        Returns:
            What is known of these tokens: another page where they were known already, and somebody holds it.
        """
        parent = before.id if before else self._roots.setdefault(salt, next(self._ids))
        key = (parent, tuple(tokens))
        known = self._known.get(key)
        if known is None:
            return self._know(KnownPage(next(self._ids), page), key)
        if known.page != page and not self._pool.holders(known.page):  # a page that is held is not lost meanwhile
            self._pool.drop(known.page)
            del self._keys[known.page]
            return self._know(KnownPage(known.id, page), key)
        return known

    def snapshot(self, known: KnownPage) -> Slot | None:
        """The recurrent state at the end of a page; None: it is not known."""
        return self._snapshots.get(known.id)

    def add_snapshot(self, known: KnownPage, slot: Slot) -> bool:
        """Know the recurrent state at the end of a page from now on: that of `slot`, which is copied.

        Returns:
            Whether it is new: it was not known, and there was room for it.
        """
        before = self._snapshots.get(known.id)
        if self._slots is None or not self.holds(known):
            return False
        if before:
            self._slots.touch(before)
            return False
        copy = self._slots.snapshot(slot, lambda: self._forget_snapshot(known.id))
        if copy:
            self._snapshots[known.id] = copy
        return copy is not None

    def drop_snapshot(self, known: KnownPage) -> None:
        """Know the recurrent state at the end of a page no longer."""
        snapshot = self._snapshots.pop(known.id, None)
        if snapshot and self._slots:
            self._slots.drop(snapshot)

    def holds(self, known: KnownPage) -> bool:
        """Whether a page still has the content that it was known for; from any thread.

        It is asked after the content was read by someone who does not hold the page: if the answer is yes, nobody has
        begun to write something else into it until now.
        """
        key = self._keys.get(known.page)
        return key is not None and self._known.get(key) is known

    def _know(self, known: KnownPage, key: Key) -> KnownPage:
        self._known[key] = known
        self._keys[known.page] = key
        self._pool.keep(known.page, self._lose)
        return known

    def _lose(self, page: int) -> None:
        self.drop_snapshot(self._known.pop(self._keys.pop(page)))

    def _forget_snapshot(self, id: int) -> None:
        del self._snapshots[id]
