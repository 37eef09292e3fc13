"""`PagedCache`: the memory behind the pages. A page number means the same tokens in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentkv.errors import CacheError
from latentkv.state.pages import PagePool
from latentkv.state.spec import PAGE_SIZE, KVFormat, LayerSpec, LayerState, bytes_per_token, page_bytes


class PagedCache:
    """Paged storage for what a model's layers remember, allocated whole and at once.

    Args:
        specs: what each layer keeps (`ModelConfig.specs`).
        num_pages: pages in all.
        page_size: tokens a page.
        device: where the storage lives.

    Attributes:
        pool: who holds which page.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_pages: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        _require_sizes(specs, num_pages, page_size)
        self.specs = tuple(specs)
        self.page_size = page_size
        self._layers: list[LayerState] = []
        try:
            for spec in self.specs:
                self._layers.append(spec.allocate(num_pages, page_size, device))
        except (RuntimeError, MemoryError) as error:
            raise CacheError(
                f"{num_pages} cache pages need {num_pages * self.page_bytes:,} bytes, which {device} cannot give: "
                "lower kv_cache_bytes or the context"
            ) from error
        self.pool = PagePool(num_pages)

    @classmethod
    def sized(
        cls,
        specs: Sequence[LayerSpec],
        kv_cache_bytes: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """The largest cache of whole pages that fits in `kv_cache_bytes`.

        Raises:
            CacheError: not even one page fits.
        """
        _require_sizes(specs, 1, page_size)
        needed = page_bytes(specs, page_size)
        if kv_cache_bytes < needed:
            raise CacheError(
                f"kv_cache_bytes={kv_cache_bytes:,} is less than one page of {page_size} tokens: "
                f"give at least {needed:,}"
            )
        return cls(specs, kv_cache_bytes // needed, page_size=page_size, device=device)

    @property
    def num_pages(self) -> int:
        """Pages in all, free and held."""
        return self.pool.num_pages

    @property
    def format(self) -> KVFormat:
        """How tokens are stored."""
        return self.specs[0].tokens.format

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return bytes_per_token(self.specs)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return page_bytes(self.specs, self.page_size)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the storage really takes: page_bytes * num_pages, exactly."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storage)

    @property
    def storage(self) -> list[Tensor]:
        """All tensors, layer by layer, each [N, ...]."""
        return [tensor for state in self._layers for tensor in state.tensors]

    def pages_for(self, tokens: int) -> int:
        """How many pages `tokens` tokens fill, the last one perhaps in part."""
        if tokens < 0:
            raise CacheError(f"{tokens} tokens cannot be cached: the number cannot be negative")
        return -(-tokens // self.page_size)

    def view(self, layer: int) -> LayerState:
        """What a layer remembers."""
        return self._layers[layer]

    def page_parts(self, page: int) -> list[memoryview]:
        """The memory of `page` (of a cache on the CPU) as bytes, layer by layer."""
        return [memoryview(rows[page]) for rows in self._as_bytes]

    @cached_property
    def _as_bytes(self) -> list[NDArray[np.uint8]]:
        """The storage, each tensor [N, bytes of a page]."""
        return [tensor.view(torch.uint8).flatten(1).numpy() for tensor in self.storage]

    def check(self) -> None:
        """Prove the invariants: every page is free xor held, and the storage is what the formula says.

        Raises:
            CacheError: one is broken.
        """
        self.pool.check()
        predicted = self.page_bytes * self.num_pages
        if self.allocated_bytes != predicted:
            raise CacheError(
                f"inconsistent cache: {self.allocated_bytes:,} bytes are allocated, the formula says {predicted:,}"
            )


def _require_sizes(specs: Sequence[LayerSpec], num_pages: int, page_size: int) -> None:
    if not specs:
        raise CacheError("a cache without layers stores nothing: give at least one LayerSpec")
    if num_pages < 1:
        raise CacheError(f"a cache of {num_pages} pages holds no token: ask for at least one page")
    if page_size < 1:
        raise CacheError(f"page_size={page_size} holds no token: use 1 or more (64 is usual)")
