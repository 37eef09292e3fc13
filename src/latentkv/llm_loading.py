"""From what a person asks of `LLM` to a model that runs: its files found, its weights packed, its cache allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latentkv.checkpoint.identity import weights_digest
from latentkv.checkpoint.source import resolve_model
from latentkv.checkpoint.tensors import Tensors
from latentkv.engine import Engine
from latentkv.engine.adaptive import AdaptiveDrafter
from latentkv.engine.drafts import Drafter, NGramDrafter
from latentkv.engine.memory import beside_weights, default_cache_bytes, free_memory
from latentkv.engine.mtp import MTPDrafter
from latentkv.errors import ConfigError
from latentkv.llm_options import (
    Draft,
    context_of,
    drafts_by_mtp,
    dtype_to_run,
    embedded_model,
    end_ids,
    kv_format,
    open_packed_folder,
    require_int8_products,
    tokenizer_of,
)
from latentkv.models.config import ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.fingerprint import model_fingerprint
from latentkv.models.kept import load_kept
from latentkv.models.loading import load_model
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.packing import Packing, choose_packing, require_rounded_input
from latentkv.models.stored_config import open_checkpoint
from latentkv.state import KVFormat, PagedCache, PageStore, StoreFolder
from latentkv.text import Tokenizer
from latentkv.weights.packed_file import PackedFile


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is to be loaded; `LLM` tells what each means."""

    device: torch.device
    dtype: torch.dtype | None
    weights: str | None
    activations: str
    kv_dtype: KVFormat | Literal["auto"]
    int8_products: bool
    max_context: int | None
    kv_cache_bytes: int | None
    max_running: int
    speculate: int
    draft: Draft
    step_seconds: float | None
    cache_dir: str | Path | None
    cache_dir_bytes: int
    packed_dir: str | Path | None
    packed_dir_bytes: int | None


@dataclass(frozen=True)
class LoadedModel:
    """A model and what runs it; `LLM` tells what each is."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    max_context: int
    decoder: Decoder
    packed_file: PackedFile | None
    cache: PagedCache
    store: PageStore | None
    engine: Engine


def load(model: str | Path | None, options: LoadOptions) -> LoadedModel:
    """Load a model in this thread, which is the one that must run it; None is the embedded one. Raises as `LLM`."""
    store_folder = None if options.cache_dir is None else StoreFolder(Path(options.cache_dir).expanduser())
    folder = embedded_model() if model is None else resolve_model(model)
    config, reader = open_checkpoint(folder)
    if options.int8_products:
        require_int8_products(config, options.kv_dtype, options.device)
        if options.speculate:
            raise ConfigError("int8_products and speculate exclude each other: a draft is checked in exact products.")
    max_context = context_of(options.max_context, config)
    tokenizer = tokenizer_of(folder, config)
    dtype = dtype_to_run(options.dtype, config, reader, options.device)
    packing = choose_packing(options.weights, dtype, options.device, options.activations)
    decoder, packed_file = _decoder(folder, config, reader, packing, dtype, max_context, options)
    if packing is not None and packing.rounds_input:
        require_rounded_input(decoder)
    config = decoder.config
    by_mtp = drafts_by_mtp(options.draft, decoder) and options.speculate > 0
    cache = _cache(decoder, by_mtp, max_context, packed_file, folder, options)
    store: PageStore | None = None
    if store_folder:
        weights = weights_digest(folder, store_folder.path / "weights.json")
        fingerprint = model_fingerprint(decoder, weights, packing=packing, int8_products=options.int8_products)
        store = PageStore(store_folder, options.cache_dir_bytes, fingerprint, cache)
    engine = Engine(
        decoder,
        cache,
        end_ids(config, tokenizer),
        step_seconds=options.step_seconds,
        max_running=options.max_running,
        drafter=_drafter(decoder, cache, by_mtp, options),
        most_drafted=options.speculate,
        store=store,
    )
    return LoadedModel(folder, config, tokenizer, max_context, decoder, packed_file, cache, store, engine)


def _decoder(
    folder: Path,
    config: ModelConfig,
    reader: Tensors,
    packing: Packing | None,
    dtype: torch.dtype,
    max_context: int,
    options: LoadOptions,
) -> tuple[Decoder, PackedFile | None]:
    """The decoder, and the file that its weights are mapped from if they are."""
    kept = None
    packed_folder = open_packed_folder(options.packed_dir, options.packed_dir_bytes)
    if packing is not None and packed_folder is not None:
        kept = load_kept(config, reader, packed_folder, packing, dtype=dtype, max_context=max_context)
    decoder, file = kept or (
        load_model(folder, dtype=dtype, device=options.device, max_context=max_context, packing=packing),
        None,
    )
    if options.int8_products:
        for module in decoder.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.int8_products = True
    return decoder, file


def _cache(
    decoder: Decoder,
    by_mtp: bool,
    max_context: int,
    packed_file: PackedFile | None,
    folder: Path,
    options: LoadOptions,
) -> PagedCache:
    """The cache, of as many bytes as were asked for or as there is room for."""
    fmt = kv_format(options.kv_dtype, decoder.dtype)
    specs = decoder.config.specs(fmt, mtp=decoder.dtype if by_mtp else None, most_drafted=options.speculate)
    num_bytes = options.kv_cache_bytes
    free = free_memory(options.device)
    if packed_file:
        free = beside_weights(free, packed_file.nbytes, folder)
    if num_bytes is None:
        num_bytes = default_cache_bytes(specs, max_context, free)
    return PagedCache.sized(specs, num_bytes, device=options.device)


def _drafter(decoder: Decoder, cache: PagedCache, by_mtp: bool, options: LoadOptions) -> AdaptiveDrafter | None:
    if not options.speculate:
        return None
    drafters: list[Drafter] = [] if options.draft == "mtp" else [NGramDrafter()]
    if by_mtp:
        drafters.append(MTPDrafter(decoder, cache))
    return AdaptiveDrafter(*drafters)
