"""`PagedCache`: the memory behind the pages. A page number means the same tokens in every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentkv.errors import CacheError
from latentkv.state.pages import PagePool
from latentkv.state.slots import Slot, SlotPool
from latentkv.state.spec import (
    PAGE_SIZE,
    KVFormat,
    LayerSpec,
    LayerState,
    Zeros,
    bytes_per_token,
    page_bytes,
    sequence_bytes,
)

SLOTS_SHARE = 0.25
"""Of a cache's bytes, that recurrent states take: those of running sequences, and snapshots of them."""

LEAST_SLOTS = 8
"""Where these take more, but no more than half."""


class PagedCache:
    """Paged storage for what a model's layers remember, allocated whole and at once.

    Args:
        specs: what each layer keeps (`ModelConfig.specs`).
        num_pages: pages in all.
        page_size: tokens a page.
        num_slots: sequences whose recurrent state is kept at once, where a layer is recurrent.
        device: where the storage lives.
        common: what gives the memory that processes which share the layers out have in common; None: there is none.
        model_specs: what each layer of the whole model keeps, where `specs` are those of some of its layers and other
            processes have the others: pages and slots are the whole model's. None: `specs` are all.

    Attributes:
        specs: of the layers that are stored here.
        model_specs: of all layers.
        pool: who holds which page.
        slots: who holds which slot; None where no layer is recurrent.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_pages: int,
        *,
        page_size: int = PAGE_SIZE,
        num_slots: int = 1,
        device: torch.device | str = "cpu",
        common: Zeros | None = None,
        model_specs: Sequence[LayerSpec] | None = None,
    ) -> None:
        self.specs, self.model_specs = tuple(specs), tuple(specs if model_specs is None else model_specs)
        _require_sizes(self.model_specs, num_pages, page_size, num_slots)
        self.page_size = page_size
        num_slots = num_slots if sequence_bytes(self.model_specs) else 0
        self._layers: list[LayerState] = []
        try:
            for spec in self.specs:
                self._layers.append(spec.allocate(num_pages, page_size, device, num_slots=num_slots, common=common))
        except (RuntimeError, MemoryError) as error:
            states = f" and the recurrent states of {num_slots} sequences {num_slots * self.sequence_bytes:,}"
            raise CacheError(
                f"{num_pages} cache pages need {num_pages * self.page_bytes:,} bytes{states if num_slots else ''}, "
                f"which {device} cannot give: lower kv_cache_bytes or the context"
            ) from error
        self.pool = PagePool(num_pages)
        self.slots = SlotPool(self.slot_storage, num_slots) if num_slots else None

    @classmethod
    def sized(
        cls,
        specs: Sequence[LayerSpec],
        kv_cache_bytes: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """The largest cache of whole pages and slots that fits in `kv_cache_bytes`; see `pages_and_slots`."""
        num_pages, num_slots = pages_and_slots(specs, kv_cache_bytes, page_size)
        return cls(specs, num_pages, page_size=page_size, num_slots=num_slots, device=device)

    @property
    def num_pages(self) -> int:
        """Pages in all, free and held."""
        return self.pool.num_pages

    @property
    def num_slots(self) -> int:
        """Sequences whose recurrent state is kept at once, snapshots too; 0 where no layer is recurrent."""
        return self.slots.num_slots if self.slots else 0

    @property
    def format(self) -> KVFormat:
        """How tokens are stored."""
        return next(spec.tokens.format for spec in self.model_specs if spec.tokens is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return bytes_per_token(self.specs)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return page_bytes(self.specs, self.page_size)

    @property
    def kept_page_bytes(self) -> int:
        """Of these, what is kept of a full page."""
        return sum(spec.kept_page_bytes(self.page_size) for spec in self.specs)

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence's recurrent states in all layers."""
        return sequence_bytes(self.specs)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the storage really takes: page_bytes * num_pages + sequence_bytes * num_slots, exactly."""
        rings = [state.rings for state in self._layers if state.rings is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.storage, *self.slot_storage, *rings))

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages and slots that sequences hold."""
        slots = self.slots.num_slots - self.slots.free_slots if self.slots else 0
        return self._bytes_of(self.num_pages - self.pool.free_pages, slots)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the free pages and slots in which something can still be found."""
        return self._bytes_of(self.pool.kept_pages, self.slots.num_snapshots if self.slots else 0)

    @property
    def storage(self) -> list[Tensor]:
        """What is kept of full pages: all tensors, layer by layer, each [N, ...]."""
        return [tensor for state in self._layers for tensor in state.tensors]

    @property
    def slot_storage(self) -> list[Tensor]:
        """What lies in slots: all tensors, layer by layer, each [S, ...]."""
        return [tensor for state in self._layers if state.recurrent for tensor in state.recurrent.tensors]

    def pages_for(self, tokens: int) -> int:
        """How many pages `tokens` tokens fill, the last one perhaps in part."""
        if tokens < 0:
            raise CacheError(f"{tokens} tokens cannot be cached: the number cannot be negative")
        return -(-tokens // self.page_size)

    def fitting_sequences(self, tokens: int) -> int:
        """How many sequences of `tokens` tokens there is room for beside those that run."""
        room = self.pool.free_pages // self.pages_for(tokens)
        return min(room, self.slots.free_slots) if self.slots else room

    def view(self, layer: int) -> LayerState:
        """What a layer remembers."""
        return self._layers[layer]

    def page_parts(self, page: int) -> list[memoryview]:
        """The memory of a full `page` (of a cache on the CPU) as bytes, layer by layer."""
        return [memoryview(rows[page]) for rows in self._as_bytes]

    def slot_parts(self, slot: Slot, waiting: int) -> list[memoryview]:
        """The memory of `slot` and `waiting` drafted tokens in it (of a cache on the CPU) as bytes, layer by layer."""
        tensors: list[Tensor] = []
        for state in self._layers:
            if state.recurrent:
                tensors += [tensor[slot.index] for tensor in state.recurrent.kept]
                tensors += [tensor[slot.index, :waiting] for tensor in state.recurrent.waiting if waiting]
        rows: list[Any] = [tensor.flatten().view(torch.uint8).numpy() for tensor in tensors]
        return [memoryview(row) for row in rows]

    @property
    def most_drafted(self) -> int:
        """Tokens of a draft that can wait beside a recurrent state."""
        return min((spec.recurrent.most_drafted for spec in self.model_specs if spec.recurrent), default=0)

    @property
    def longest_draft(self) -> float:
        """Tokens of a draft that every layer has room for; infinity where each is as good as another."""
        specs = self.model_specs
        rooms = [spec.ring.rows - spec.index.pool for spec in specs if spec.ring and spec.index]
        return min([*rooms, *(spec.recurrent.most_drafted for spec in specs if spec.recurrent)], default=math.inf)

    def _bytes_of(self, pages: int, slots: int) -> int:
        return pages * self.page_size * self.bytes_per_token + slots * self.sequence_bytes

    @cached_property
    def _as_bytes(self) -> list[NDArray[np.uint8]]:
        """The storage, each tensor [N, bytes of a page]."""
        return [tensor.view(torch.uint8).flatten(1).numpy() for tensor in self.storage]

    def check(self) -> None:
        """Prove the invariants: every page and slot is free xor held, and the storage is what the formula says.

        Raises:
            CacheError: one is broken.
        """
        self.pool.check()
        if self.slots:
            self.slots.check()
        predicted = self.page_bytes * self.num_pages + self.sequence_bytes * self.num_slots
        if self.allocated_bytes != predicted:
            raise CacheError(
                f"inconsistent cache: {self.allocated_bytes:,} bytes are allocated, the formula says {predicted:,}"
            )


def pages_and_slots(specs: Sequence[LayerSpec], num_bytes: int, page_size: int = PAGE_SIZE) -> tuple[int, int]:
    """How many pages, and slots, the largest cache in so many bytes has.

    Slots take `SLOTS_SHARE` of it, or `LEAST_SLOTS` if those take at most half; one and a page are always there. Where
    no layer is recurrent, one slot is counted, which takes no room.

    Raises:
        CacheError: not even one page, and one slot where a layer is recurrent, fits.
    """
    _require_sizes(specs, 1, page_size)
    page, slot = page_bytes(specs, page_size), sequence_bytes(specs)
    if num_bytes < page + slot:
        state = " and the recurrent state of one sequence" if slot else ""
        raise CacheError(
            f"kv_cache_bytes={num_bytes:,} is less than one page of {page_size} tokens{state}: "
            f"give at least {page + slot:,}"
        )
    num_slots = 0
    if slot:
        wanted = max(int(num_bytes * SLOTS_SHARE) // slot, min(LEAST_SLOTS, num_bytes // 2 // slot), 2)
        num_slots = min(wanted, (num_bytes - page) // slot)
    return (num_bytes - num_slots * slot) // page, max(num_slots, 1)


def _require_sizes(specs: Sequence[LayerSpec], num_pages: int, page_size: int, num_slots: int = 1) -> None:
    if not bytes_per_token(specs):
        raise CacheError("a cache without layers that keep tokens stores none: give at least one LayerSpec with tokens")
    if num_slots < 1:
        raise CacheError(f"a cache of {num_slots} slots holds no recurrent state: ask for at least one slot")
    if num_pages < 1:
        raise CacheError(f"a cache of {num_pages} pages holds no token: ask for at least one page")
    if page_size < 1:
        raise CacheError(f"page_size={page_size} holds no token: use 1 or more (64 is usual)")
