"""Stores over small caches, and pages to keep in them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from latentkv.state import LayerSpec, PagedCache, PageKey, PageStore, StoreFolder
from latentkv.state.spec import IndexSpec, KeyValueSpec, LastStateSpec, LatentSpec

PAGE = 4  # tokens
SPECS: dict[str, list[LayerSpec]] = {
    "fp32": [LayerSpec(LatentSpec(16, 8, "fp32"))] * 2,
    "bf16": [LayerSpec(LatentSpec(32, 8, "bf16"))] * 3,
    "fp16": [LayerSpec(LatentSpec(30, 8, "fp16"))],
    "int8": [LayerSpec(LatentSpec(33, 8, "int8"))] * 3,
    "fp8": [LayerSpec(LatentSpec(128, 16, "fp8"))] * 2,
    "kv": [LayerSpec(KeyValueSpec(3, 5, "bf16"))] * 2,
    "layers that differ": [
        LayerSpec(LatentSpec(30, 8, "fp16")),
        LayerSpec(KeyValueSpec(2, 6, "fp16")),
        LayerSpec(LatentSpec(16, 8, "fp16"), IndexSpec(6, torch.float16), LastStateSpec(10, torch.bfloat16)),
    ],
}
BLOCK = 4096  # bytes that the file of each of these pages takes
MODEL = b"a model"


def filled_cache(specs: list[LayerSpec] | None = None, num_pages: int = 8) -> PagedCache:
    """A cache whose pages all hold other bytes, NaN patterns among them."""
    cache = PagedCache(specs or SPECS["bf16"], num_pages, page_size=PAGE)
    generator = random.Random(0)
    for page in range(num_pages):
        for part in cache.page_parts(page):
            part[:] = generator.randbytes(part.nbytes)
    return cache


def content(cache: PagedCache, page: int) -> bytes:
    return b"".join(cache.page_parts(page))


def wipe(cache: PagedCache) -> None:
    for tensor in cache.storage:
        tensor.view(torch.uint8).fill_(0)


def open_store(folder: Path, cache: PagedCache, *, max_bytes: int = 1 << 20, fingerprint: bytes = MODEL) -> PageStore:
    return PageStore(StoreFolder(folder), max_bytes, fingerprint, cache)


def keys_of(store: PageStore, tokens: list[int], salt: str = "") -> list[PageKey]:
    """Keys of the full pages of a text."""
    keys: list[PageKey] = []
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        page = tokens[start : start + PAGE]
        keys.append(keys[-1].next(page) if keys else store.first_key(salt, page))
    return keys


def save(store: PageStore, key: PageKey, page: int) -> int:
    return store.save(key, page, lambda: True)


def load(store: PageStore, keys: list[PageKey], pages: list[int]) -> int:
    return store.load(keys, pages, lambda: True)


def page_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.page"))


def bytes_on_disk(folder: Path) -> int:
    """Of all page files, half-written ones too, in whole blocks."""
    files = [path for path in folder.iterdir() if ".page" in path.name]
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)
