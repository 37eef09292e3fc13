import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentkv.errors import CacheError
from latentkv.state import KnownPage, PagePool, PrefixIndex

SIZE = 2


def remember(index: PrefixIndex, pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Read `tokens` into pages as a sequence would, sharing what is known, and let go of them."""
    known = index.find(salt, tokens)
    pool.share(each.page for each in known)
    pages = [each.page for each in known] + pool.allocate(len(tokens) // SIZE - len(known))
    last = known[-1] if known else None
    for i in range(len(known), len(pages)):
        last = index.add(salt, last, tokens[SIZE * i : SIZE * i + SIZE], pages[i])
    pool.free(reversed(pages))
    return pages


def found(index: PrefixIndex, tokens: list[int], salt: str = "") -> list[int]:
    return [each.page for each in index.find(salt, tokens)]


def test_full_pages_are_found_by_their_tokens_and_all_tokens_before_them():
    pool = PagePool(9)
    index = PrefixIndex(pool, SIZE)
    pages = remember(index, pool, [1, 2, 3, 4, 5, 6])
    assert found(index, [1, 2, 3, 4, 5, 6]) == pages
    assert found(index, [1, 2, 3, 4, 5]) == pages[:2]  # the last page is not full
    assert found(index, [1, 2, 3, 9, 5, 6]) == pages[:1]
    assert found(index, [3, 4, 5, 6]) == []  # the same page after another text
    assert pool.free_pages == 9


def test_a_hash_that_two_texts_share_is_not_enough():
    pool = PagePool(9)
    index = PrefixIndex(pool, SIZE)
    assert hash((-1, 3)) == hash((-2, 3))
    remember(index, pool, [-1, 3])
    assert found(index, [-2, 3]) == []


def test_texts_of_other_salts_are_never_found():
    pool = PagePool(9)
    index = PrefixIndex(pool, SIZE)
    own = remember(index, pool, [1, 2, 3, 4], "alice")
    assert found(index, [1, 2, 3, 4], "bob") == []
    assert found(index, [1, 2, 3, 4], "alice") == own


def test_pages_that_nobody_holds_stay_findable_until_they_are_needed_and_the_end_of_a_prefix_goes_first():
    pool = PagePool(4)
    index = PrefixIndex(pool, SIZE)
    pages = remember(index, pool, [1, 2, 3, 4, 5, 6])
    (unused,) = pool.allocate(1)
    assert unused not in pages
    pool.allocate(1)
    assert found(index, [1, 2, 3, 4, 5, 6]) == pages[:2]
    pool.allocate(2)
    assert found(index, [1, 2, 3, 4, 5, 6]) == []
    assert len(index) == 0


def test_what_was_used_last_is_kept_longest():
    pool = PagePool(2)
    index = PrefixIndex(pool, SIZE)
    remember(index, pool, [1, 2])
    remember(index, pool, [3, 4])
    remember(index, pool, [1, 2])
    pool.allocate(1)
    assert len(found(index, [1, 2])) == 1
    assert found(index, [3, 4]) == []


def test_of_two_pages_with_the_same_text_the_first_is_found():
    pool = PagePool(4)
    index = PrefixIndex(pool, SIZE)
    first, second = pool.allocate(2)
    known = index.add("", None, [1, 2], first)
    assert index.add("", None, [1, 2], second) is known
    assert found(index, [1, 2]) == [first]
    pool.free([second])
    assert pool.allocate(1) == [second]  # it was not kept


def test_a_page_that_comes_after_a_forgotten_one_is_not_found_under_its_successor():
    pool = PagePool(2)
    index = PrefixIndex(pool, SIZE)
    a, b = pool.allocate(2)
    index.add("", index.add("", None, [1, 2], a), [3, 4], b)
    pool.free([a, b])  # the first page is reused first
    assert pool.allocate(1) == [a]
    index.add("", None, [9, 9], a)
    assert found(index, [9, 9, 3, 4]) == [a]


def test_a_free_page_can_only_be_shared_while_it_is_kept():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.keep(page, lambda page: None)
    pool.free([page])
    pool.share([page])
    assert (pool.holders(page), pool.free_pages) == (1, 1)
    pool.check()
    with pytest.raises(CacheError, match="page 1"):
        pool.share([1])
    with pytest.raises(CacheError, match="page 1"):
        pool.keep(1, lambda page: None)


@given(st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=30), st.integers(5, 12))
def test_whatever_is_found_holds_what_was_written(texts: list[list[int]], num_pages: int):
    pool = PagePool(num_pages)
    index = PrefixIndex(pool, SIZE)
    content: dict[int, tuple[int, ...]] = {}
    for text in texts:
        tokens = text[: SIZE * (len(text) // SIZE)]
        known: list[KnownPage] = index.find("", tokens)
        for i, each in enumerate(known):
            assert content[each.page] == tuple(tokens[: SIZE * i + SIZE])
        for i, page in enumerate(remember(index, pool, tokens)):
            content[page] = tuple(tokens[: SIZE * i + SIZE])
        pool.check()
        assert pool.free_pages == num_pages


def test_a_page_is_held_by_what_it_was_known_for_until_it_is_reused():
    pool = PagePool(1)
    index = PrefixIndex(pool, SIZE)
    (page,) = pool.allocate(1)
    known = index.add("", None, [1, 2], page)
    pool.free([page])
    assert index.holds(known)
    pool.allocate(1)
    assert not index.holds(known)
    again = index.add("", None, [1, 2], page)  # the same text in the same page, but read anew
    assert index.holds(again)
    assert not index.holds(known)
