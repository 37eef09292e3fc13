import pytest
import torch

from latentkv.errors import CacheError
from latentkv.state import (
    IndexSpec,
    KeyValueSpec,
    LastStateSpec,
    LatentSpec,
    LayerSpec,
    PagedCache,
    RecurrentSpec,
    page_bytes,
    sequence_bytes,
)

SPECS = {
    "latent": [LayerSpec(LatentSpec(32, 8, "bf16"))] * 3,
    "int8": [LayerSpec(LatentSpec(33, 8, "int8"))] * 3,
    "fp8": [LayerSpec(LatentSpec(128, 16, "fp8"))] * 2,
    "kv": [LayerSpec(KeyValueSpec(3, 5, "fp32"))] * 2,
    "layers that differ": [
        LayerSpec(LatentSpec(30, 8, "fp16")),
        LayerSpec(KeyValueSpec(2, 6, "fp16")),
        LayerSpec(LatentSpec(16, 8, "fp16"), IndexSpec(6, torch.float16), LastStateSpec(10, torch.bfloat16)),
    ],
    "recurrent": [
        LayerSpec(None, recurrent=RecurrentSpec(((3, 4, 6), (3, 42)), ((42,), (3, 4), (3,)), most_drafted=2)),
        LayerSpec(LatentSpec(30, 8, "fp16")),
        LayerSpec(None, recurrent=RecurrentSpec(((2, 4, 5), (2, 30)), ((7, 2),))),
    ],
}


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 64), (7, 3)])
def test_the_bytes_allocated_are_the_bytes_of_the_formula(specs, num_pages, page_size):
    cache = PagedCache(specs, num_pages, page_size=page_size)
    assert cache.allocated_bytes == cache.page_bytes * num_pages + cache.sequence_bytes * cache.num_slots
    tensors = [*cache.storage, *cache.slot_storage]
    assert cache.allocated_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert cache.num_slots == (1 if any(spec.recurrent for spec in specs) else 0)
    assert cache.bytes_per_token == sum(spec.token_bytes for spec in specs)
    once = sum(spec.last_state.page_bytes for spec in specs if spec.last_state)
    assert cache.page_bytes == page_size * cache.bytes_per_token + once
    cache.check()


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_a_cache_sized_by_bytes_is_the_largest_that_fits(specs):
    needed, slots = page_bytes(specs, 16), 2 * sequence_bytes(specs)
    for pages, spare in ((1, 0), (4, needed - 1), (5, 0)):
        cache = PagedCache.sized(specs, pages * needed + slots + spare, page_size=16)
        assert cache.num_pages == pages
        assert cache.allocated_bytes <= pages * needed + slots + spare


def test_slots_take_a_quarter_of_a_cache_or_are_eight_but_leave_half_of_it_and_are_two_if_they_leave_a_page():
    specs = SPECS["recurrent"]
    page, slot = page_bytes(specs, 16), sequence_bytes(specs)
    for budget, slots in ((page + slot, 1), (page + 2 * slot, 2), (10 * slot, 5), (20 * slot, 8), (40 * slot, 10)):
        cache = PagedCache.sized(specs, budget, page_size=16)
        assert cache.num_slots == slots
        assert budget - page < cache.allocated_bytes <= budget
    with pytest.raises(CacheError, match=f"recurrent state of one sequence: give at least {page + slot:,}"):
        PagedCache.sized(specs, page + slot - 1, page_size=16)


def test_recurrent_layers_keep_float32_states_for_each_slot_and_nothing_for_tokens():
    cache = PagedCache(SPECS["recurrent"], 3, page_size=8, num_slots=5)
    first, second, third = states = [cache.view(index) for index in range(3)]
    assert [tuple(tensor.shape) for tensor in first.recurrent.tensors] == [
        (5, 3, 4, 6),
        (5, 3, 42),
        (5, 2, 42),
        (5, 2, 3, 4),
        (5, 2, 3),
    ]
    assert [tuple(tensor.shape) for tensor in third.recurrent.tensors] == [(5, 2, 4, 5), (5, 2, 30), (5, 0, 7, 2)]
    assert second.recurrent is None and [len(state.tensors) for state in states] == [0, 1, 0]
    assert all(tensor.dtype == torch.float32 for tensor in cache.slot_storage)
    assert cache.format == "fp16" and cache.bytes_per_token == second.pages.nbytes // 24
    assert cache.sequence_bytes * 5 == sum(tensor.nbytes for tensor in cache.slot_storage)
    cache.check()
    with pytest.raises(CacheError, match="nothing of each token"):
        _ = first.pages
    with pytest.raises(CacheError, match="nothing of each token"):
        _ = first.kv_format


def test_a_budget_under_one_page_is_refused_with_the_least_that_works():
    with pytest.raises(CacheError, match=r"kv_cache_bytes=100 .*at least 15,360"):
        PagedCache.sized(SPECS["latent"], 100)


def test_memory_that_does_not_exist_is_a_cache_error():
    with pytest.raises(CacheError, match="lower kv_cache_bytes"):
        PagedCache([LayerSpec(LatentSpec(512, 64))] * 60, 2**30)


def test_tokens_fill_pages_and_the_last_in_part():
    cache = PagedCache(SPECS["latent"], 1)
    assert [cache.pages_for(n) for n in (0, 1, 63, 64, 65, 128, 131_072)] == [0, 1, 1, 1, 2, 2, 2048]
    with pytest.raises(CacheError, match="-1"):
        cache.pages_for(-1)


def test_a_layer_has_memory_of_its_own_in_its_own_shape():
    cache = PagedCache(SPECS["layers that differ"], 4, page_size=8)
    first, second, third = states = [cache.view(index) for index in range(3)]
    first.pages[1, 3] = 1.0
    second.pages[0, 0] = 2.0
    assert cache.storage[0].count_nonzero() == first.pages.shape[2] and cache.storage[0][1, 3].eq(1).all()
    assert cache.storage[1].count_nonzero() == 2 * 2 * 6 and cache.storage[1][0, 0].eq(2).all()
    assert not cache.storage[2].any() and not cache.storage[3].any()
    assert [tuple(state.pages.shape) for state in states] == [(4, 8, 40), (4, 8, 2, 2, 6), (4, 8, 24)]
    assert all(state.pages.is_contiguous() and state.kv_format == "fp16" for state in states)
    assert first.last_states is second.last_states is None
    assert third.last_states.shape == (4, 10) and third.last_states.dtype == torch.bfloat16
    assert cache.format == "fp16"


def test_bytes_in_use_and_bytes_that_can_be_found_again_are_those_of_pages_and_slots():
    cache = PagedCache(SPECS["recurrent"], 4, page_size=8, num_slots=3)
    page = 8 * cache.bytes_per_token
    cache.pool.keep(cache.pool.allocate(2)[1], lambda page: None)
    slot = cache.slots.allocate()
    cache.slots.snapshot(slot, lambda: None)
    assert cache.used_bytes == 2 * page + cache.sequence_bytes and cache.kept_bytes == cache.sequence_bytes
    cache.pool.free([0, 1])
    cache.slots.free(slot)
    assert (cache.used_bytes, cache.kept_bytes) == (0, page + cache.sequence_bytes)


def test_check_finds_storage_that_is_not_what_the_formula_says():
    cache = PagedCache(SPECS["latent"], 4)
    cache.view(0).pages.data = torch.zeros(4, 64, 80, dtype=torch.bfloat16)
    with pytest.raises(CacheError, match="inconsistent"):
        cache.check()


def test_no_specs_no_pages_and_empty_pages_are_refused():
    for specs, pages, size in (([], 1, 1), (SPECS["kv"], 0, 1), (SPECS["kv"], 1, 0)):
        with pytest.raises(CacheError):
            PagedCache(specs, pages, page_size=size)
    with pytest.raises(CacheError, match="0 slots"):
        PagedCache(SPECS["recurrent"], 1, num_slots=0)
    with pytest.raises(CacheError, match="layers that keep tokens"):
        PagedCache(SPECS["recurrent"][:1], 1)
