from pathlib import Path

import pytest
import torch

from latentkv.engine import memory
from latentkv.engine.memory import default_cache_bytes, free_memory
from latentkv.state import LastStateSpec, LatentSpec, LayerSpec, PagedCache, RecurrentSpec, page_bytes


def test_the_default_cache_is_one_context_in_whole_pages_or_half_of_the_free_memory():
    specs = [
        *[LayerSpec(LatentSpec(20, 8, "fp32"))] * 2,
        LayerSpec(LatentSpec(20, 8), last_state=LastStateSpec(9, torch.bfloat16)),
    ]
    page = 64 * (2 * 112 + 64) + 2 * 9
    assert default_cache_bytes(specs, 65, 10**12) == 2 * page
    assert default_cache_bytes(specs, 64, 10**12) == page
    assert default_cache_bytes(specs, 10**9, 1000) == 500


def test_the_default_cache_has_a_context_and_slots_beside_it():
    specs = [
        LayerSpec(LatentSpec(20, 8, "fp32")),
        LayerSpec(None, recurrent=RecurrentSpec(((2, 16, 16), (3, 96)), ((96,),))),
    ]
    slot = specs[1].sequence_bytes
    for context in (64, 64 * 8, 64 * 100):
        room = default_cache_bytes(specs, context, 10**12)
        cache = PagedCache.sized(specs, room)
        assert cache.num_pages * cache.page_size >= context
        assert cache.num_slots >= 4 and cache.allocated_bytes <= room
        assert room == page_bytes(specs) * context // 64 + max(8 * slot, -(-page_bytes(specs) * context // 64 // 3))


def test_main_memory_has_some_free():
    assert 1 << 20 < free_memory("cpu") < 1 << 50


def test_a_control_groups_limit_counts_but_not_the_file_cache_that_it_would_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    unlimited = free_memory("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    assert free_memory("cpu") > unlimited // 2
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory("cpu") == 100_000
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 700000\nactive_file 100000\n")
    assert free_memory("cpu") == 800_000
