"""Of a cache that several processes share out, what all heads read is there once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from latentkv.state import (
    CommonMemory,
    IndexSpec,
    KeyValueSpec,
    LastStateSpec,
    LatentSpec,
    LayerSpec,
    PagedCache,
    RingSpec,
    common_bytes,
    share_bytes,
)
from latentkv.state.recurrent import RecurrentSpec

PAGES, SIZE = 3, 32
LATENTS = LatentSpec(24, 8, "fp32")
SPARSE = LayerSpec(LATENTS, index=IndexSpec(8, torch.int8, pool=32), ring=RingSpec(8, 32, torch.float32))
GQA = LayerSpec(KeyValueSpec(2, 8))
MODULE = LayerSpec(LATENTS, last_state=LastStateSpec(16, torch.float32))


def caches(specs: Sequence[LayerSpec], count: int) -> list[PagedCache]:
    """Of so many processes, each with its own mapping of the memory that they have in common."""
    num_bytes = common_bytes(specs, PAGES, SIZE)
    file = os.memfd_create("test")
    os.ftruncate(file, num_bytes)
    made = [PagedCache(specs, PAGES, page_size=SIZE, common=CommonMemory(file, num_bytes)) for _ in range(count)]
    os.close(file)
    return made


def test_latents_and_index_keys_are_in_common_and_all_else_is_each_ones_own():
    first, second = caches([SPARSE, GQA, MODULE], 2)
    for layer in range(3):
        state = first.view(layer)
        for tensor in (*state.tensors, *([state.rings] if state.rings is not None else [])):
            assert not tensor.any()
            tensor.fill_(layer + 1)
    sparse, gqa, module = (second.view(layer) for layer in range(3))
    assert (sparse.pages == 1).all() and sparse.index_keys is not None and (sparse.index_keys == 1).all()
    assert sparse.rings is not None and not sparse.rings.any()
    assert not gqa.pages.any()
    assert not module.pages.any() and module.last_states is not None and not module.last_states.any()
    first.check()
    second.check()


@pytest.mark.parametrize("specs", [[SPARSE] * 3, [GQA, SPARSE], [LayerSpec(LatentSpec(512, 64, "int8"))]])
def test_its_memory_has_room_for_every_layer_each_from_a_cache_line_on(specs: list[LayerSpec]):
    (cache,) = caches(specs, 1)
    common = [tensor for layer, spec in enumerate(specs) if spec is not GQA for tensor in cache.view(layer).tensors]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in common)
    assert sum(tensor.nbytes for tensor in common) == PAGES * sum(spec.common_page_bytes(SIZE) for spec in specs)


def test_a_share_is_what_is_ones_own_and_an_equal_part_of_what_is_in_common():
    recurrent = LayerSpec(None, recurrent=RecurrentSpec(((4, 4),), ((2,),), 1))
    specs = [SPARSE, GQA, MODULE, recurrent]
    whole = share_bytes(specs, PAGES, 2, SIZE, 1)
    assert whole == PAGES * sum(spec.page_bytes(SIZE) for spec in specs) + 2 * recurrent.sequence_bytes
    common = PAGES * SPARSE.common_page_bytes(SIZE)
    assert whole - share_bytes(specs, PAGES, 2, SIZE, 3) == common - -(-common // 3)
