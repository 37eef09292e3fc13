"""`PrefixIndex`: pages found again by the tokens in them, so that a prompt's known beginning is not read twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from latentkv.state.pages import PagePool

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

    Args:
        pool: of the pages.
        page_size: tokens a page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._ids = count()
        self._roots: dict[str, int] = {}
        self._known: dict[Key, KnownPage] = {}
        self._keys: dict[int, Key] = {}  # by page

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._known)

    def find(self, salt: str, tokens: Sequence[int]) -> list[KnownPage]:
        """The known full pages that `tokens` begin with."""
        found: list[KnownPage] = []
        parent = self._roots.get(salt)
        while parent is not None and (len(found) + 1) * self._page_size <= len(tokens):
            start = len(found) * self._page_size
            known = self._known.get((parent, tuple(tokens[start : start + self._page_size])))
            if known is None:
                break
            found.append(known)
            parent = known.id
        return found

    def add(self, salt: str, before: KnownPage | None, tokens: Sequence[int], page: int) -> KnownPage:
        """Make the full `page` of `tokens`, which follows `before` (None: begins a text), findable.

        Returns:
            What is known of these tokens: another page where they were known already.
        """
        parent = before.id if before else self._roots.setdefault(salt, next(self._ids))
        key = (parent, tuple(tokens))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = KnownPage(next(self._ids), page)
            self._keys[page] = key
            self._pool.keep(page, self._lose)
        return known

    def holds(self, known: KnownPage) -> bool:
        """Whether a page still has the content that it was known for; from any thread.

        It is asked after the content was read by someone who does not hold the page: if the answer is yes, nobody has
        begun to write something else into it until now.
        """
        key = self._keys.get(known.page)
        return key is not None and self._known.get(key) is known

    def _lose(self, page: int) -> None:
        del self._known[self._keys.pop(page)]
