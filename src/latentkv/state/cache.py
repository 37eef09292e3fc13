"""`PagedCache`: the memory behind the pages. A page number means the same tokens in every layer of every plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkv.errors import CacheError
from latentkv.state.pages import PagePool
from latentkv.state.spec import PAGE_SIZE, KVFormat, LayerSpec


class PagedCache:
    """Paged storage for the attention state of a model's layers, allocated whole and at once.

    Args:
        planes: what is stored for each token (`ModelConfig.planes`).
        num_pages: pages in all.
        page_size: tokens a page.
        device: where the storage lives.

    Attributes:
        pool: who holds which page.
        storage: one tensor a plane, [its layers, N, P, ...] (`layout` says what a token looks like).
    """

    def __init__(
        self,
        planes: Sequence[LayerSpec],
        num_pages: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        _require_sizes(planes, num_pages, page_size)
        self.planes = tuple(planes)
        self.page_size = page_size
        self.storage: list[Tensor] = []
        try:
            for plane in self.planes:
                self.storage.append(plane.allocate(num_pages, page_size, device))
        except (RuntimeError, MemoryError) as error:
            needed = num_pages * page_size * self.bytes_per_token
            raise CacheError(
                f"{num_pages} cache pages need {needed:,} bytes, which {device} cannot give: "
                "lower kv_cache_bytes or the context"
            ) from error
        self.pool = PagePool(num_pages)

    @classmethod
    def sized(
        cls,
        planes: Sequence[LayerSpec],
        kv_cache_bytes: int,
        *,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """The largest cache of whole pages that fits in `kv_cache_bytes`.

        Raises:
            CacheError: not even one page fits.
        """
        _require_sizes(planes, 1, page_size)
        page_bytes = page_size * sum(plane.bytes_per_token for plane in planes)
        if kv_cache_bytes < page_bytes:
            raise CacheError(
                f"kv_cache_bytes={kv_cache_bytes:,} is less than one page of {page_size} tokens: "
                f"give at least {page_bytes:,}"
            )
        return cls(planes, kv_cache_bytes // page_bytes, page_size=page_size, device=device)

    @property
    def num_pages(self) -> int:
        """Pages in all, free and held."""
        return self.pool.num_pages

    @property
    def format(self) -> KVFormat:
        """How plane 0 is stored."""
        return self.planes[0].format

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers of all planes."""
        return sum(plane.bytes_per_token for plane in self.planes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the storage really takes: bytes_per_token * page_size * num_pages, exactly."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storage)

    def pages_for(self, tokens: int) -> int:
        """How many pages `tokens` tokens fill, the last one perhaps in part."""
        if tokens < 0:
            raise CacheError(f"{tokens} tokens cannot be cached: the number cannot be negative")
        return -(-tokens // self.page_size)

    def layer(self, index: int, plane: int = 0) -> Tensor:
        """The pages [N, P, ...] of layer `index` of `plane`, a view of the storage."""
        return self.storage[plane][index]

    def page_parts(self, page: int) -> list[memoryview]:
        """The memory of `page` (of a cache on the CPU) as bytes: planes in order, of each its layers in order."""
        return [
            memoryview(part) for tensor in self.storage for part in tensor.view(torch.uint8).flatten(2)[:, page].numpy()
        ]

    def check(self) -> None:
        """Prove the invariants: every page is free xor held, and the storage is what the formula says.

        Raises:
            CacheError: one is broken.
        """
        self.pool.check()
        predicted = self.bytes_per_token * self.page_size * self.num_pages
        if self.allocated_bytes != predicted:
            raise CacheError(
                f"inconsistent cache: {self.allocated_bytes:,} bytes are allocated, the layout says {predicted:,}"
            )


def _require_sizes(planes: Sequence[LayerSpec], num_pages: int, page_size: int) -> None:
    if not planes:
        raise CacheError("a cache without planes stores nothing: give at least one LatentSpec or KeyValueSpec")
    if num_pages < 1:
        raise CacheError(f"a cache of {num_pages} pages holds no token: ask for at least one page")
    if page_size < 1:
        raise CacheError(f"page_size={page_size} holds no token: use 1 or more (64 is usual)")
