"""How fast a prefix goes to a folder and comes back: `python benchmarks/offload/store_speed.py --dir /tmp/store`.

It needs no weights: pages of a published shape are filled with noise, written and read as a server does, without steps
beside.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from latentkv.plan import as_kv_format, load_config, mha_bytes
from latentkv.sizes import parse_tokens
from latentkv.state import PagedCache, PageKey, PageStore, StoreFolder


def main() -> None:
    """Write and read each format, and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="deepseek-v2-lite", help="a published shape, as in latentkv plan")
    parser.add_argument("--tokens", default="32k", help="of the prefix")
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int8"])
    parser.add_argument("--dir", type=Path, required=True, help="a folder that does not exist; it is removed")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many is printed")
    options = parser.parse_args()
    config, tokens = load_config(options.shape), parse_tokens(options.tokens)
    print(f"{options.shape}, {tokens:,} tokens; MHA in bf16: {mha_bytes(config) * tokens / 1e9:.2f} GB")
    print("| cache | GB | write GB/s | read GB/s | read, not in the page cache, GB/s |")
    print("|---|---:|---:|---:|---:|")
    for name in options.formats:
        cache = PagedCache(config.specs(as_kv_format(name)), -(-tokens // 64))
        for tensor in cache.storage:
            tensor.view(torch.uint8).random_()
        speeds = [measure(cache, options.dir) for _ in range(options.repeat)]
        write, read, cold = (max(column) / 1e9 for column in zip(*speeds, strict=True))
        print(f"| {name} | {cache.allocated_bytes / 1e9:.2f} | {write:.2f} | {read:.2f} | {cold:.2f} |", flush=True)


def measure(cache: PagedCache, folder: Path) -> tuple[float, float, float]:
    """Bytes a second of writing, of reading what the system still holds, and of reading from the disk."""
    folder.mkdir(parents=True)
    try:
        store = PageStore(StoreFolder(folder), 1 << 50, secrets.token_bytes(8), cache)
        keys = [store.first_key("", range(64))]
        while len(keys) < cache.num_pages:
            keys.append(keys[-1].next(range(64)))
        write = seconds_of(lambda: [store.save(key, page, lambda: True) for page, key in enumerate(keys)])
        read = seconds_of(lambda: read_all(store, keys))
        drop_from_memory(folder)
        cold = seconds_of(lambda: read_all(store, keys))
        store.close()
    finally:
        shutil.rmtree(folder)
    return cache.allocated_bytes / write, cache.allocated_bytes / read, cache.allocated_bytes / cold


def read_all(store: PageStore, keys: list[PageKey]) -> None:
    """Read every page, or complain."""
    if store.load(keys, range(len(keys)), lambda: True) != len(keys):
        raise SystemExit("The store did not give back what was written.")


def seconds_of(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drop_from_memory(folder: Path) -> None:
    """Have the system forget the files' contents."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
