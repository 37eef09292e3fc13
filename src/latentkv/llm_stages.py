"""What the ranks of one model agree on as it is loaded: that they are alike, who has which layers, the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from hashlib import sha256

import torch

from latentkv.checkpoint.adapter import adapter_digest
from latentkv.checkpoint.names import layer_of
from latentkv.checkpoint.tensors import Tensors
from latentkv.engine.memory import default_cache_bytes, free_memory
from latentkv.errors import CacheError, ConfigError
from latentkv.llm_options import LoadOptions, kv_format
from latentkv.models.config import ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, packed_weights, require_rounded_input
from latentkv.models.parameters import checkpoint_dtype, layer_reads, layer_weight_bytes
from latentkv.models.shard import Shard, require_can_be_shared_out
from latentkv.models.stage import GROUP_ROWS, Stage, Weighed, cut
from latentkv.parallel import MemorySums, Ranks, ShardTeam, sums_of, team_file
from latentkv.state import (
    LEAST_SLOTS,
    PAGE_SIZE,
    CommonMemory,
    LayerSpec,
    PagedCache,
    common_bytes,
    pages_and_slots,
    share_bytes,
)

logger = logging.getLogger("latentkv.parallel")

_GIB = 2**30


def require_can_be_cut(options: LoadOptions) -> None:
    """Raise `ConfigError` for what a model in several processes cannot do."""
    asked = "pipeline_parallel" if options.pipeline_parallel > 1 else "tensor_parallel"
    if options.cache_dir is not None:
        raise ConfigError(
            f"cache_dir cannot be had with {asked}, for each rank has the pages of its own layers alone: "
            "leave one of them out."
        )
    if options.device.type != "cpu":
        raise ConfigError(f"{asked} runs on CPUs: leave out device, or run on one GPU without it.")


def agree_on_stage(
    ranks: Ranks,
    config: ModelConfig,
    reader: Tensors,
    packing: Packing | None,
    dtype: torch.dtype,
    max_context: int,
    options: LoadOptions,
) -> Stage:
    """The layers of this rank, or its shard of them.

    Raises:
        ConfigError: the ranks are not alike, or the model cannot be cut into so many stages or shards.
        RankError: another rank has ended.
    """
    ranks.agree(
        {
            "a model of the digest": _digest(config, reader),
            "dtype": str(dtype).removeprefix("torch."),
            "weights": options.weights,
            "lora": None if options.lora is None else adapter_digest(options.lora),
            "activations": options.activations,
            "kv_dtype": options.kv_dtype,
            "int8_products": options.int8_products,
            "max_context": max_context,
            "kv_cache_bytes": options.kv_cache_bytes,
            "speculate": options.speculate,
            "tensor_parallel": options.tensor_parallel,
        }
    )
    shard = Shard(ranks.rank - ranks.team[0], len(ranks.team))
    require_can_be_shared_out(config, shard.count)
    ranks.tell("memory", {"free": free_memory(options.device) // ranks.local_size})
    free = [said["free"] for said in ranks.hear_all("memory")]
    # A stage has as much room as its shards have together.
    memories = [shard.count * min(free[rank : rank + shard.count]) for rank in range(0, ranks.size, shard.count)]
    weights, beside = _weight_bytes(config, reader, packing)
    specs = config.specs(kv_format(options.kv_dtype, dtype), most_drafted=options.speculate)
    pages = -(-max_context // PAGE_SIZE)
    if options.kv_cache_bytes is not None:
        pages = pages_and_slots(specs, options.kv_cache_bytes)[0]
    kept = shard.config(config).specs(kv_format(options.kv_dtype, dtype), most_drafted=options.speculate)
    sizes = [
        held + shard.count * share_bytes([spec], pages, 0, PAGE_SIZE, _sharers(ranks))
        for held, spec in zip(weights, kept, strict=True)
    ]
    stored = checkpoint_dtype(config) if packing is None or packing.format is None else packing.format.name
    time = Weighed(*layer_reads(config, stored, GROUP_ROWS))
    return cut(config, Weighed(sizes, beside), memories, time)[ranks.stage].sharded(shard)


def team_of(ranks: Ranks, config: ModelConfig, shard: Shard) -> ShardTeam | None:
    """The ranks that share the layers of this one's stage out; None: it has them alone.

    Raises:
        ConfigError: they are not on one machine.
        RankError: another rank has ended.
    """
    if shard.is_whole:
        return None
    widths = [len(shard.head_rows(config.vocab_size, index)) for index in range(shard.count)]
    sums = sums_of(ranks)
    if isinstance(sums, MemorySums):
        ranks.when_lost = sums.abandon
    return ShardTeam(ranks.rank, ranks.team, widths, sums, ranks.loss)


def require_some_rounded_input(ranks: Ranks, decoder: Decoder) -> None:
    """Raise `ConfigError` where no rank has a weight that rounds its input."""
    ranks.tell("rounds", {"any": any(weight.rounds_input for weight in packed_weights(decoder))})
    if not any(said["any"] for said in ranks.hear_all("rounds")):
        require_rounded_input(decoder)


def shared_cache(
    ranks: Ranks,
    decoder: Decoder,
    specs: Sequence[LayerSpec],
    own_specs: Sequence[LayerSpec],
    max_context: int,
    free: int,
    options: LoadOptions,
) -> PagedCache:
    """This rank's part of the cache, whose pages and slots are the same everywhere: the driver says how many.

    Args:
        ranks: this one among all.
        decoder: its stage.
        specs: of all layers, whole.
        own_specs: likewise, of this rank's shard of each.
        max_context: tokens of the longest sequence.
        free: bytes that are left for this rank.
        options: what was asked for.

    Raises:
        CacheError: the cache does not fit.
        RankError: another rank has ended.
    """
    own = decoder.stage.own(own_specs)
    sharers = _sharers(ranks)
    ranks.tell("room", {"free": free, "context": _context_bytes(own, max_context, sharers)})
    if ranks.is_driver:
        num_bytes = options.kv_cache_bytes
        if num_bytes is None:
            # As much of the whole cache as every rank has room for its part of.
            whole = _context_bytes(specs, max_context)
            said = ranks.hear_all("room")
            room = min(each["free"] * whole // max(each["context"], 1) for each in said)
            num_bytes = default_cache_bytes(specs, max_context, room)
        num_pages, num_slots = pages_and_slots(specs, num_bytes)
        ranks.tell("cache", {"pages": num_pages, "slots": num_slots})
    cache_size = ranks.hear("cache", 0)
    num_pages, num_slots = cache_size["pages"], cache_size["slots"]
    common = None if sharers == 1 else _common_memory(ranks, common_bytes(own, num_pages, PAGE_SIZE))
    cache = PagedCache(own, num_pages, num_slots=num_slots, device=options.device, common=common, model_specs=specs)
    ranks.tell("ready", {"bytes": cache.allocated_bytes})
    logger.info(
        "Rank %d of %d: %s, %.2f GiB of cache%s.",
        ranks.rank,
        ranks.size,
        decoder.stage,
        share_bytes(own, num_pages, cache.num_slots, PAGE_SIZE, sharers) / _GIB,
        "" if ranks.is_driver else f"; it waits for rank {0 if ranks.rank == ranks.team[0] else ranks.team[0]}",
    )
    if ranks.is_driver:
        ranks.hear_all("ready")
    return cache


def _sharers(ranks: Ranks) -> int:
    """Processes that have what all heads read of the cache in common."""
    return len(ranks.team) if ranks.shares_memory else 1


def _common_memory(ranks: Ranks, num_bytes: int) -> CommonMemory:
    """The part of the cache that the ranks of a team have in common.

    Raises:
        CacheError: it cannot be mapped.
        ConfigError: the others' memory cannot be opened.
        RankError: another rank has ended.
    """
    file = team_file(ranks, "cache", num_bytes)
    try:
        return CommonMemory(file, num_bytes)
    except OSError as error:
        raise CacheError(
            f"Rank {ranks.rank} cannot map {num_bytes:,} bytes of cache ({error.strerror}): lower kv_cache_bytes or "
            "the context."
        ) from error
    finally:
        os.close(file)


def _context_bytes(specs: Sequence[LayerSpec], max_context: int, sharers: int = 1) -> int:
    """Bytes of one whole context, and of some sequences' recurrent states."""
    return share_bytes(specs, -(-max_context // PAGE_SIZE), LEAST_SLOTS, PAGE_SIZE, sharers)


def _weight_bytes(config: ModelConfig, reader: Tensors, packing: Packing | None) -> tuple[Sequence[int], int]:
    """Bytes of each layer's weights in memory, about, and of those that belong to none: for a fair cut."""
    if packing is not None and packing.format is not None:
        return layer_weight_bytes(config, packing.format.name)
    layers, beside = [0] * config.num_layers, 0
    for name in reader.names:
        layer = layer_of(name)
        if layer is not None and layer < config.num_layers:
            layers[layer] += reader.nbytes(name)
        else:
            beside += reader.nbytes(name)
    return layers, beside


def _digest(config: ModelConfig, reader: Tensors) -> str:
    """Of a model's config and of the names and sizes of its tensors; their values are not read."""
    tensors = sorted((name, reader.shown_dtype(name), reader.nbytes(name)) for name in reader.names)
    return sha256(repr((config, tensors)).encode()).hexdigest()[:12]
