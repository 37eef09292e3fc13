"""Engines whose prefixes go to a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from engine_models import VOCAB, cache_for, tiny_decoder
from latentkv.engine import Engine, Request, SamplingParams
from latentkv.models.decoder import Decoder
from latentkv.state import PagedCache, PageStore, StoreFolder

PAGE = 8  # tokens, see cache_for
BLOCK = 4096  # bytes that the file of a page takes


def store_for(folder: Path, cache: PagedCache, *, max_bytes: int = 1 << 20, fingerprint: bytes = b"tiny") -> PageStore:
    return PageStore(StoreFolder(folder), max_bytes, fingerprint, cache)


def engine_for(folder: Path, *, kind: str = "mla", pages: int = 40, max_bytes: int = 1 << 20, **options) -> Engine:
    decoder = tiny_decoder(kind)
    cache = cache_for(decoder, pages)
    return Engine(decoder, cache, store=store_for(folder, cache, max_bytes=max_bytes), **options)


def ask(prompt: list[int], **params) -> Request:
    params = {"max_tokens": 6, "ignore_eos": True, "temperature": 0, **params}
    return Request.create(prompt, SamplingParams(**params), vocab_size=VOCAB, max_context=128)


def tokens(engine: Engine, *requests: Request, salt: str = "") -> list[list[int]]:
    """What each request produces, run together."""
    indices = [engine.add(request, salt=salt) for request in requests]
    result: dict[int, list[int]] = {index: [] for index in indices}
    left = len(indices)
    while left:
        for event in engine.step():
            result[event.index].append(event.token_id)
            left -= event.finish_reason is not None
        engine.cache.check()
    assert engine.cache.pool.free_pages == engine.cache.num_pages
    return list(result.values())


def settle(engine: Engine) -> None:
    """Wait until all that was offered to the store is written."""
    offload = engine._scheduler._offload
    assert offload is not None
    offload._writer.submit(int).result()


def forget(engine: Engine) -> None:
    """Use all free pages and slots for something else."""
    pool = engine.cache.pool
    pages = pool.allocate(pool.free_pages)
    rings = [ring for index in range(len(engine.cache.specs)) if (ring := engine.cache.view(index).rings) is not None]
    for tensor in (*engine.cache.storage, *rings):
        tensor[pages] = float("nan")
    pool.free(pages)
    slots = engine.cache.slots
    if slots:
        taken = [slots.allocate() for _ in range(slots.free_slots)]
        for slot in taken:
            for tensor in engine.cache.slot_storage:
                tensor[slot.index] = float("nan")
            slots.free(slot)


@torch.inference_mode()
def naive(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a loop without a cache."""
    ids = list(prompt)
    for _ in range(count):
        hidden = decoder.forward_train(torch.tensor([ids]))
        ids.append(int(decoder.logits(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]
