import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentkv.errors import CacheError
from latentkv.state import PagePool


def test_allocated_pages_are_distinct_and_come_back_when_freed():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert len(set(pages)) == 3
    assert set(pages) <= set(range(4))
    assert pool.free_pages == 1
    pool.free(pages)
    assert pool.free_pages == 4
    pool.check()


def test_a_full_pool_says_what_was_asked_what_is_free_and_what_to_do_and_takes_nothing():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(CacheError, match=r"2 pages were asked for and 1 of 4 are free.*kv_cache_bytes.*context"):
        pool.allocate(2)
    assert pool.free_pages == 1
    pool.check()


def test_a_shared_page_is_free_only_after_its_last_holder_frees_it():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.share([page])
    assert pool.holders(page) == 2
    pool.free([page])
    assert (pool.holders(page), pool.free_pages) == (1, 1)
    pool.free([page])
    assert (pool.holders(page), pool.free_pages) == (0, 2)


@pytest.mark.parametrize("use", ["free", "share"])
@pytest.mark.parametrize("bad", [1, 7, -1])
def test_a_page_that_is_free_or_unknown_is_refused_and_no_count_changes(use, bad):
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(CacheError, match=f"page {bad}"):
        getattr(pool, use)([page, bad])
    assert pool.holders(page) == 1
    pool.check()


def test_freeing_a_page_twice_in_one_call_is_refused():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(CacheError, match="2 time"):
        pool.free([page, page])
    assert pool.holders(page) == 1


def test_no_pages_and_negative_requests_are_refused():
    with pytest.raises(CacheError, match="0 pages"):
        PagePool(0)
    with pytest.raises(CacheError, match="-1"):
        PagePool(1).allocate(-1)


@pytest.mark.parametrize("harm", ["lost", "foreign", "counted"])
def test_check_finds_a_broken_invariant(harm):
    pool = PagePool(3)
    pool.allocate(1)
    if harm == "lost":
        pool._free.popitem()
    elif harm == "foreign":
        pool._free[3] = None
    else:
        pool._counts[2] = 1
    with pytest.raises(CacheError, match="inconsistent"):
        pool.check()


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 5))))
def test_any_history_of_use_keeps_every_page_free_xor_held(num_pages, history):
    pool = PagePool(num_pages)
    held: list[list[int]] = []
    for action, n in history:
        if action == "allocate":
            if n <= pool.free_pages:
                held.append(pool.allocate(n))
            else:
                with pytest.raises(CacheError):
                    pool.allocate(n)
        elif held and action == "share":
            pool.share(held[n % len(held)])
            held.append(list(held[n % len(held)]))
        elif held:
            pool.free(held.pop(n % len(held)))
        pool.check()
        assert num_pages - pool.free_pages == len({page for pages in held for page in pages})
        assert all(pool.holders(p) == sum(pages.count(p) for pages in held) for p in range(num_pages))
