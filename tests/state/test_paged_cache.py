import pytest
import torch

from latentkv.errors import CacheError
from latentkv.state import KeyValueSpec, LatentSpec, PagedCache

PLANES = {
    "latent": [LatentSpec(3, 32, 8, "bf16")],
    "int8": [LatentSpec(3, 33, 8, "int8")],
    "fp8": [LatentSpec(2, 128, 16, "fp8")],
    "kv": [KeyValueSpec(2, 3, 5, "fp32")],
    "two planes": [LatentSpec(3, 30, 8, "fp16"), KeyValueSpec(1, 2, 6, "bf16")],
}


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 64), (7, 3)])
def test_the_bytes_allocated_are_the_bytes_of_the_formula(planes, num_pages, page_size):
    cache = PagedCache(planes, num_pages, page_size=page_size)
    assert cache.allocated_bytes == cache.bytes_per_token * page_size * num_pages
    assert cache.allocated_bytes == sum(tensor.numel() * tensor.itemsize for tensor in cache.storage)
    assert cache.bytes_per_token == sum(plane.bytes_per_token for plane in planes)
    cache.check()


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_a_cache_sized_by_bytes_is_the_largest_that_fits(planes):
    page_bytes = 16 * sum(plane.bytes_per_token for plane in planes)
    for budget, pages in ((page_bytes, 1), (5 * page_bytes - 1, 4), (5 * page_bytes, 5)):
        cache = PagedCache.sized(planes, budget, page_size=16)
        assert cache.num_pages == pages
        assert cache.allocated_bytes <= budget


def test_a_budget_under_one_page_is_refused_with_the_least_that_works():
    with pytest.raises(CacheError, match=r"kv_cache_bytes=100 .*at least 15,360"):
        PagedCache.sized(PLANES["latent"], 100)


def test_memory_that_does_not_exist_is_a_cache_error():
    with pytest.raises(CacheError, match="lower kv_cache_bytes"):
        PagedCache([LatentSpec(60, 512, 64)], 2**30)


def test_tokens_fill_pages_and_the_last_in_part():
    cache = PagedCache(PLANES["latent"], 1)
    assert [cache.pages_for(n) for n in (0, 1, 63, 64, 65, 128, 131_072)] == [0, 1, 1, 1, 2, 2, 2048]
    with pytest.raises(CacheError, match="-1"):
        cache.pages_for(-1)


def test_a_layer_is_a_contiguous_view_of_the_storage():
    cache = PagedCache(PLANES["two planes"], 4, page_size=8)
    cache.layer(2)[1, 3] = 1.0
    cache.layer(0, plane=1)[0, 0] = 2.0
    assert cache.storage[0][2, 1, 3].eq(1).all()
    assert cache.storage[0].count_nonzero() == cache.storage[0].shape[-1]
    assert cache.storage[1][0, 0, 0].eq(2).all()
    assert all(cache.layer(i).is_contiguous() for i in range(3))
    assert cache.format == "fp16"


def test_check_finds_storage_that_is_not_what_the_layout_says():
    cache = PagedCache(PLANES["latent"], 4)
    cache.storage[0] = torch.zeros(3, 4, 64, 80, dtype=torch.bfloat16)
    with pytest.raises(CacheError, match="inconsistent"):
        cache.check()


def test_no_planes_no_pages_and_empty_pages_are_refused():
    for planes, pages, size in (([], 1, 1), (PLANES["kv"], 0, 1), (PLANES["kv"], 1, 0)):
        with pytest.raises(CacheError):
            PagedCache(planes, pages, page_size=size)
