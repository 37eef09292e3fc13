"""From what a person asks of `LLM` to a model that runs: its files found, its weights packed, its cache allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from latentkv.generation_config import sampling_defaults
from latentkv.llm_options import (
    LoadOptions,
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
from latentkv.llm_stages import agree_on_stage, require_can_be_cut, require_some_rounded_input, shared_cache, team_of
from latentkv.models.config import ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.fingerprint import model_fingerprint
from latentkv.models.kept import load_kept
from latentkv.models.loading import load_model
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.packing import Packing, choose_packing, require_rounded_input
from latentkv.models.stage import Stage
from latentkv.models.stored_config import open_checkpoint
from latentkv.parallel import Pipeline, Ranks, join, run_stage
from latentkv.state import PagedCache, PageStore, StoreFolder
from latentkv.text import Tokenizer
from latentkv.weights.packed_file import PackedFile


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
    ranks: Ranks | None
    sampling_defaults: Mapping[str, Any]


def load(options: LoadOptions) -> LoadedModel:
    """Load a model in this thread, which is the one that must run it. Raises as `LLM`.

    In a rank that is not the driver it loads that rank's stage and runs it to the end, and then raises `SystemExit`.
    """
    if options.num_ranks == 1:
        return _load(options, None)
    require_can_be_cut(options)
    ranks = join(
        options.pipeline_parallel,
        team_size=options.tensor_parallel,
        timeout=options.rank_timeout,
        trust_network=options.trust_network,
    )
    try:
        return _load(options, ranks)
    except SystemExit:
        raise
    except BaseException as error:
        ranks.give_up(error)
        ranks.leave()
        raise


def _load(options: LoadOptions, ranks: Ranks | None) -> LoadedModel:
    store_folder = None if options.cache_dir is None else StoreFolder(Path(options.cache_dir).expanduser())
    folder = embedded_model() if options.model is None else resolve_model(options.model)
    defaults = sampling_defaults(options.generation_config, folder)
    config, reader = open_checkpoint(folder, options.lora)
    if options.int8_products:
        require_int8_products(config, options.kv_dtype, options.device)
        if options.speculate:
            raise ConfigError("int8_products and speculate exclude each other: a draft is checked in exact products.")
    max_context = context_of(options.max_context, config)
    tokenizer = tokenizer_of(folder, config)
    dtype = dtype_to_run(options.dtype, config, reader, options.device)
    packing = choose_packing(options.weights, dtype, options.device, options.activations)
    stage = None
    if ranks:
        stage = agree_on_stage(ranks, config, reader, packing, dtype, max_context, options)
    decoder, packed_file = _decoder(folder, config, reader, packing, dtype, max_context, stage, options)
    if packing is not None and packing.rounds_input:
        require_rounded_input(decoder) if ranks is None else require_some_rounded_input(ranks, decoder)
    config = decoder.config
    by_mtp = decoder.stage.reads_tokens and drafts_by_mtp(options.draft, decoder) and options.speculate > 0
    free = free_memory(options.device) // (ranks.local_size if ranks else 1)
    if packed_file:
        free = beside_weights(free, packed_file.nbytes, folder)
    fmt = kv_format(options.kv_dtype, decoder.dtype)
    specs, own_specs = (
        each.specs(fmt, mtp=decoder.dtype if by_mtp else None, most_drafted=options.speculate)
        for each in (config, decoder.stage.shard.config(config))
    )
    team = None
    if ranks:
        if (team := team_of(ranks, config, decoder.stage.shard)) is not None:
            decoder.join(team)
        cache = shared_cache(ranks, decoder, specs, own_specs, max_context, free, options)
        if not ranks.is_driver:
            run_stage(decoder, cache, ranks.ring, team)
            ranks.leave()
            raise SystemExit(0)
    else:
        num_bytes = options.kv_cache_bytes
        if num_bytes is None:
            num_bytes = default_cache_bytes(specs, max_context, free)
        cache = PagedCache.sized(specs, num_bytes, device=options.device)
    store: PageStore | None = None
    if store_folder:
        weights = weights_digest(reader.files, store_folder.path / "weights.json")
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
        pipeline=Pipeline(ranks, team) if ranks else None,
    )
    return LoadedModel(
        folder, config, tokenizer, max_context, decoder, packed_file, cache, store, engine, ranks, defaults
    )


def _decoder(
    folder: Path,
    config: ModelConfig,
    reader: Tensors,
    packing: Packing | None,
    dtype: torch.dtype,
    max_context: int,
    stage: Stage | None,
    options: LoadOptions,
) -> tuple[Decoder, PackedFile | None]:
    """The decoder, and the file that its weights are mapped from if they are."""
    kept = None
    packed_folder = open_packed_folder(options.packed_dir, options.packed_dir_bytes)
    if packing is not None and packed_folder is not None:
        kept = load_kept(config, reader, packed_folder, packing, dtype=dtype, max_context=max_context, stage=stage)
    decoder, file = kept or (
        load_model(
            folder,
            dtype=dtype,
            device=options.device,
            max_context=max_context,
            packing=packing,
            stage=stage,
            lora=options.lora,
        ),
        None,
    )
    if options.int8_products:
        for module in decoder.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.int8_products = True
    return decoder, file


def _drafter(decoder: Decoder, cache: PagedCache, by_mtp: bool, options: LoadOptions) -> AdaptiveDrafter | None:
    if not options.speculate:
        return None
    drafters: list[Drafter] = [] if options.draft == "mtp" else [NGramDrafter()]
    if by_mtp:
        drafters.append(MTPDrafter(decoder, cache))
    return AdaptiveDrafter(*drafters)
