"""A model in several processes: which layers each would have, whether they fit, and how fast it could be at most.

A step reads weights and cache from memory, and hidden states cross the network: the times here are those of the bytes,
with nothing counted for arithmetic, so they rank ways to run a model and bound them from above.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from latentkv.errors import RequestError
from latentkv.models.config import ModelConfig
from latentkv.models.parameters import group_bytes, layer_groups, layer_reads, layer_weight_bytes
from latentkv.models.stage import GROUP_ROWS, Stage, Weighed, cut
from latentkv.models.stored_config import stored_dtype
from latentkv.state.spec import PAGE_SIZE, KVFormat, bytes_per_token, page_bytes, sequence_bytes

_NETWORK = re.compile(r"(\d+(?:\.\d+)?)\s*gb(?:ps)?(?::(\d+(?:\.\d+)?)\s*us)?", re.IGNORECASE)
_USABLE = 0.88
"""Of a network's nominal rate, what TCP carries."""

_HOP_SECONDS = 60e-6
"""Of a small message between two machines, where nobody has measured it; a hop of gloo on loopback took 52 us."""

_STEP_BYTES = 1024
"""Numbers of a step that go beside the hidden states, about."""


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
    """A model in several processes; `rank_memory` is what each may fill, and `one_rank_fits` whether one would do."""

    ranks: tuple[RankRow, ...]
    rank_memory: int
    one_rank_fits: bool
    speeds: tuple[Speed, ...]
    memory_bandwidth: float
    network: Network
    ranks_per_box: int


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
) -> RanksPlan:
    """Cut a model into as many stages as there are ranks.

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

    Raises:
        ConfigError: the model cannot be cut so often, or `weights_dtype` is unknown.
        RequestError: a number is out of range.
    """
    if num_ranks < 1 or ranks_per_box < 1 or min(batches, default=1) < 1:
        raise RequestError("Ranks, ranks per box and the batch are each 1 or more.")
    weights, beside = layer_weight_bytes(config, weights_dtype)
    specs = config.specs(kv_dtype)
    pages = -(-context // PAGE_SIZE)
    cache = [batches[0] * (pages * page_bytes([spec]) + sequence_bytes([spec])) for spec in specs]
    sizes = [held + kept for held, kept in zip(weights, cache, strict=True)]
    time = Weighed(*layer_reads(config, weights_dtype, GROUP_ROWS))
    stages = cut(config, Weighed(sizes, beside), [rank_memory] * num_ranks, time)
    everywhere = sum(
        group.count * group_bytes(config, group, weights_dtype)
        for group in layer_groups(config, None)
        if group.kind in ("norm", "hyper-connections")
    )
    rows: list[RankRow] = []
    for rank, stage in enumerate(stages):
        held = sum(stage.own(weights)) + (beside if stage.is_first else everywhere)
        kept = sum(stage.own(cache))
        fits = held + kept <= rank_memory
        rows.append(RankRow(rank, str(stage), stage.first, stage.last - 1, held, kept, fits))
    whole = sum(row.weights_bytes + row.cache_bytes for row in rows)
    reads = StepReads(config, weights_dtype, kv_dtype, memory_bandwidth)
    speeds = tuple(_speed(reads, stages, batch, context, network, ranks_per_box) for batch in batches)
    return RanksPlan(tuple(rows), rank_memory, whole <= rank_memory, speeds, memory_bandwidth, network, ranks_per_box)


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
        layers, beside = layer_reads(self.config, self.weights_dtype, len(kv_lens))
        read = sum(stage.own(layers)) + (beside if stage.is_first else 0)
        specs = stage.own(self.config.specs(self.kv_dtype))
        read += sum(kv_lens) * bytes_per_token(specs) + len(kv_lens) * sequence_bytes(specs)
        return read / self.bandwidth


def _speed(
    reads: StepReads, stages: Sequence[Stage], batch: int, context: int, network: Network, ranks_per_box: int
) -> Speed:
    whole = Stage.whole(reads.config.num_layers)
    groups = min(len(stages), batch)
    rows = -(-batch // groups)
    times = [reads.seconds(stage, [context] * rows) for stage in stages]
    hops = sum(_crossings(len(stages), ranks_per_box))
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
