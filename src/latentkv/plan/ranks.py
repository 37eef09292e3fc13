"""A model in several processes: which layers each would have, whether they fit, and how fast it could be at most.

A step reads weights and cache from memory, and hidden states cross the network: the times here are those of the bytes,
with nothing counted for arithmetic, so they rank ways to run a model and bound them from above.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from latentkv.errors import ConfigError, RequestError
from latentkv.models.config import ModelConfig
from latentkv.models.parameters import (
    TensorGroup,
    group_bytes,
    layer_groups,
    layer_reads,
    layer_weight_bytes,
    reads_of,
)
from latentkv.models.shard import Shard, require_can_be_shared_out
from latentkv.models.stage import GROUP_ROWS, Stage, Weighed, cut
from latentkv.models.stored_config import stored_dtype
from latentkv.state.common import share_bytes
from latentkv.state.spec import PAGE_SIZE, KVFormat, bytes_per_token, sequence_bytes

_NETWORK = re.compile(r"(\d+(?:\.\d+)?)\s*gb(?:ps)?(?::(\d+(?:\.\d+)?)\s*us)?", re.IGNORECASE)
_USABLE = 0.88
"""Of a network's nominal rate, what TCP carries."""

_HOP_SECONDS = 60e-6
"""Of a small message between two machines, where nobody has measured it; a hop of gloo on loopback took 52 us."""

_STEP_BYTES = 1024
"""Numbers of a step that go beside the hidden states, about."""

_SUM_SECONDS = 5e-6
"""Of a sum through memory that processes of one machine share, until all have it, beside the bytes."""

_SUMS = 2  # of a layer: what attention gives, and what the feed-forward block does


@dataclass(frozen=True)
class Network:
    """What ranks are connected by: bytes a second, and seconds that a small message takes."""

    bytes_per_second: float
    hop_seconds: float

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read "10Gb", or "10Gb:50us" where the time of a message is known.

        Raises:
            RequestError: it is neither.
        """
        match = _NETWORK.fullmatch(text.strip())
        if not match or not float(match[1]):
            raise RequestError(
                f"{text!r} is no network; write its rate, like 10Gb, or 10Gb:50us with a message's time."
            )
        hop = _HOP_SECONDS if match[2] is None else float(match[2]) * 1e-6
        return cls(float(match[1]) * 1e9 / 8 * _USABLE, hop)

    def seconds(self, num_bytes: float) -> float:
        """Of a message."""
        return self.hop_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True)
class RankRow:
    """One rank: its layers, and the bytes of its weights and of its part of the cache."""

    rank: int
    stage: str
    first_layer: int
    last_layer: int
    weights_bytes: int
    cache_bytes: int
    fits: bool


@dataclass(frozen=True)
class Speed:
    """What bytes allow at most, for so many sequences at once.

    Attributes:
        batch: sequences.
        one_rank: tokens a second of one process that holds all, of all sequences together.
        pipeline: of the ranks together.
        network_ms: of a token's way through all ranks, what the network takes.
        memory_ms: likewise, what reading takes.
    """

    batch: int
    one_rank: float
    pipeline: float
    network_ms: float
    memory_ms: float


@dataclass(frozen=True)
class RanksPlan:
    """A model in several processes; `rank_memory` is what each may fill, and `one_rank_fits` whether one would do.

    Each stage has `team_size` ranks, which share its layers out.
    """

    ranks: tuple[RankRow, ...]
    rank_memory: int
    one_rank_fits: bool
    speeds: tuple[Speed, ...]
    memory_bandwidth: float
    network: Network
    ranks_per_box: int
    team_size: int

    @property
    def fits(self) -> bool:
        """Whether every rank has room for its part."""
        return all(row.fits for row in self.ranks)


def best_plans(config: ModelConfig, num_ranks: int, **given: Any) -> list[RanksPlan]:
    """The ways to run a model in so many processes, the fastest of those that fit first.

    Each rank a stage, or each machine one, whose ranks share its layers out. The arguments are those of `plan_ranks`;
    "fastest" is so for the first batch.

    Raises:
        ConfigError: there is none, or as `plan_ranks`.
        RequestError: a number is out of range.
    """
    plans: list[RanksPlan] = []
    refused: ConfigError | None = None
    local = min(given.get("ranks_per_box", 1), num_ranks)
    for team_size in sorted({1, local} if num_ranks % local == 0 else {1}):
        try:
            plans.append(plan_ranks(config, num_ranks, team_size=team_size, **given))
        except ConfigError as error:
            refused = refused or error
    if refused is not None and not plans:
        raise refused
    return sorted(plans, key=lambda plan: (not plan.fits, -plan.speeds[0].pipeline, plan.team_size))


def plan_ranks(
    config: ModelConfig,
    num_ranks: int,
    *,
    rank_memory: int,
    weights_dtype: str,
    context: int,
    kv_dtype: KVFormat = "bf16",
    batches: Sequence[int] = (1, 32),
    network: Network,
    memory_bandwidth: float,
    ranks_per_box: int = 1,
    team_size: int = 1,
) -> RanksPlan:
    """Cut a model into stages, and each of these into as many shards as a team has ranks.

    Args:
        config: the model.
        num_ranks: processes.
        rank_memory: bytes that each may fill.
        weights_dtype: as in `weight_bytes`.
        context: tokens a sequence.
        kv_dtype: format of the cache.
        batches: sequences at once, for each of which a speed is given; the cache is that of the first.
        network: between machines.
        memory_bandwidth: bytes a second that a rank reads.
        ranks_per_box: ranks that share a machine: no network is between them.
        team_size: ranks of a stage, all on one machine.

    Raises:
        ConfigError: the model cannot be cut so often, or its layers not shared out, or `weights_dtype` is unknown.
        RequestError: a number is out of range.
    """
    if num_ranks < 1 or ranks_per_box < 1 or min(batches, default=1) < 1:
        raise RequestError("Ranks, ranks per box and the batch are each 1 or more.")
    if num_ranks % team_size or ranks_per_box % team_size:
        raise RequestError(f"{num_ranks} ranks, {ranks_per_box} to a machine, are not teams of {team_size}.")
    require_can_be_shared_out(config, team_size)
    weights, beside = layer_weight_bytes(config, weights_dtype)
    specs = config.specs(kv_dtype)
    pages = -(-context // PAGE_SIZE)
    cache = [share_bytes([spec], batches[0] * pages, batches[0], PAGE_SIZE, 1) for spec in specs]
    sizes = [held + kept for held, kept in zip(weights, cache, strict=True)]
    time = Weighed(*layer_reads(config, weights_dtype, GROUP_ROWS))
    stages = cut(config, Weighed(sizes, beside), [team_size * rank_memory] * (num_ranks // team_size), time)
    shards = [stage.sharded(Shard(index, team_size)) for stage in stages for index in range(team_size)]
    rows: list[RankRow] = []
    for rank, stage in enumerate(shards):
        own = stage.shard.config(config).specs(kv_dtype)
        kept = share_bytes(stage.own(own), batches[0] * pages, batches[0], PAGE_SIZE, team_size)
        held = _held(config, stage, weights, beside, weights_dtype)
        fits = held + kept <= rank_memory
        rows.append(RankRow(rank, str(stage), stage.first, stage.last - 1, held, kept, fits))
    reads = StepReads(config, weights_dtype, kv_dtype, memory_bandwidth)
    speeds = tuple(
        _speed(reads, [stage.sharded(Shard(0, team_size)) for stage in stages], batch, context, network, ranks_per_box)
        for batch in batches
    )
    one_rank_fits = sum(weights) + beside + sum(cache) <= rank_memory
    return RanksPlan(
        tuple(rows), rank_memory, one_rank_fits, speeds, memory_bandwidth, network, ranks_per_box, team_size
    )


def _held(config: ModelConfig, stage: Stage, weights: Sequence[int], beside: int, dtype: str) -> int:
    """Bytes of the weights that one process has: of its layers, and of what belongs to none."""

    def total(groups: Iterable[TensorGroup]) -> int:
        return sum(group.count * group_bytes(config, group, dtype) for group in groups)

    shard, outside = stage.shard, layer_groups(config, None)
    everywhere = total(group for group in outside if group.kind in ("norm", "hyper-connections"))
    if shard.is_whole:
        return sum(stage.own(weights)) + (beside if stage.is_first else everywhere)
    held = sum(total(_groups(config, shard, layer)) for layer in range(stage.first, stage.last))
    if not stage.is_first:
        return held + everywhere
    head = _head_part(config, shard) * total(_head(config))
    if shard.is_first:
        return held + round(head) + beside - (0 if config.tie_word_embeddings else total(_head(config)))
    return held + round(head) + everywhere


def _groups(config: ModelConfig, shard: Shard, layer: int) -> list[TensorGroup]:
    """The tensors of a layer, or of a shard of it."""
    if shard.is_whole:
        return layer_groups(config, layer)
    smaller, own = shard.layer(config, layer)
    return layer_groups(replace(smaller, layers=(own,)), 0)


def _head(config: ModelConfig) -> list[TensorGroup]:
    """The output head: a copy of the embedding where they are tied, and shared out."""
    return layer_groups(replace(config, tie_word_embeddings=False), None)[-1:]


def _head_part(config: ModelConfig, shard: Shard) -> float:
    return len(shard.head_rows(config.vocab_size)) / config.vocab_size


@dataclass(frozen=True)
class StepReads:
    """What a step reads from memory, and how long that takes.

    Attributes:
        config: the model.
        weights_dtype: as in `weight_bytes`.
        kv_dtype: format of the cache.
        bandwidth: bytes a second.
    """

    config: ModelConfig
    weights_dtype: str
    kv_dtype: KVFormat
    bandwidth: float

    def seconds(self, stage: Stage, kv_lens: Sequence[int]) -> float:
        """Of a stage's layers, and what is beside the first one's, for a token of each of some sequences so long."""
        config, shard, rows = self.config, stage.shard, len(kv_lens)
        read = sum(self._read(_groups(config, shard, layer), rows) for layer in range(stage.first, stage.last))
        if stage.is_first:
            beside, head = self._read(layer_groups(config, None), rows), self._read(_head(config), rows)
            read += beside if shard.is_whole else head * _head_part(config, shard)
        specs = stage.own(shard.config(config).specs(self.kv_dtype))
        read += sum(kv_lens) * bytes_per_token(specs) + len(kv_lens) * sequence_bytes(specs)
        sums = 0.0 if shard.is_whole else _SUMS * (stage.last - stage.first) * _SUM_SECONDS
        # Each process writes its part of a sum, reads all parts, and writes the sum, in float32.
        summed = 0 if shard.is_whole else _SUMS * (stage.last - stage.first) * (shard.count + 2) * rows
        return (read + summed * config.hidden_size * 4) / self.bandwidth + sums

    def _read(self, groups: Iterable[TensorGroup], rows: int) -> float:
        return reads_of(self.config, groups, self.weights_dtype, rows)


def _speed(
    reads: StepReads, stages: Sequence[Stage], batch: int, context: int, network: Network, ranks_per_box: int
) -> Speed:
    whole = Stage.whole(reads.config.num_layers)
    groups = min(len(stages), batch)
    rows = -(-batch // groups)
    times = [reads.seconds(stage, [context] * rows) for stage in stages]
    hops = sum(_crossings(len(stages), max(ranks_per_box // stages[0].shard.count, 1)))
    message = _STEP_BYTES + rows * reads.config.hidden_size * stored_dtype(reads.config).itemsize
    on_the_way = hops * network.seconds(message)
    # Groups follow each other: the slowest stage sets the pace, unless too few are under way to keep it busy.
    round_trip = max(groups * max(times), sum(times) + on_the_way)
    return Speed(
        batch,
        batch / reads.seconds(whole, [context] * batch),
        batch / round_trip,
        on_the_way * 1e3,
        sum(times) * 1e3,
    )


def _crossings(num_ranks: int, ranks_per_box: int) -> Iterator[bool]:
    """Whether each hop leaves its machine, the one from the last rank back to the first among them."""
    if num_ranks == 1:
        return
    boxes = [rank // ranks_per_box for rank in (*range(num_ranks), 0)]
    yield from (before != after for before, after in pairwise(boxes))
