"""A pipeline of many stages, simulated: the real engine, driver and stages, on clocks of their own.

Messages go through queues, and each takes the time that a network would; each stage takes the time that reading its
weights and cache would. Nothing waits for any of that: every rank has a clock, which goes on by what it does and waits
for. So the order of things is the program's own, and the times are the model's; what comes out shows whether the plan's
formulae, which know no order of things, say how long they take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from latentkv.engine import Engine, Request, SamplingParams
from latentkv.errors import RankError
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.stage import Stage
from latentkv.parallel import Pipeline, Ranks, StageLoop
from latentkv.parallel.messages import Kind, Message, batch_of, message_of
from latentkv.plan.ranks import Network, StepReads, plan_ranks
from latentkv.state import PagedCache
from latentkv.state.spec import PAGE_SIZE

_PASS_SECONDS = 0.1
"""That reading the whole model once takes: of a large model on a fast machine, about."""

_PROMPT = 16
_SETTLED = 4  # tokens after which every sequence decodes in its group

_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}


@dataclass(frozen=True)
class SimulatedRow:
    """So many ranks and sequences: tokens a second as simulated, and as the plan has them."""

    ranks: int
    batch: int
    network: str
    simulated: float
    planned: float

    @property
    def ratio(self) -> float:
        """Of the two."""
        return self.simulated / self.planned


@dataclass(frozen=True)
class SimulationReport:
    """What was simulated."""

    rows: tuple[SimulatedRow, ...]


def simulate(
    *, ranks: Sequence[int], batches: Sequence[int], networks: Sequence[str], num_layers: int = 32, new_tokens: int = 16
) -> SimulationReport:
    """Run a small random model of `num_layers` layers in each number of ranks, with each number of sequences.

    Raises:
        ConfigError: there are more ranks than layers.
        RequestError: a network cannot be read, or a number is out of range.
    """
    config = read_config({**_CONFIG, "num_hidden_layers": num_layers})
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    whole = StepReads(config, "fp32", "fp32", 1.0).seconds(Stage.whole(num_layers), [_PROMPT])
    bandwidth = whole / _PASS_SECONDS
    return SimulationReport(
        tuple(
            _row(config, decoder, count, batch, network, bandwidth, new_tokens)
            for count in ranks
            for batch in batches
            for network in networks
        )
    )


def _row(
    config: ModelConfig, decoder: Decoder, count: int, batch: int, network: str, bandwidth: float, new_tokens: int
) -> SimulatedRow:
    between = Network.parse(network)
    plan = plan_ranks(
        config,
        count,
        rank_memory=1 << 40,
        weights_dtype="fp32",
        context=_PROMPT + (_SETTLED + new_tokens) // 2,
        kv_dtype="fp32",
        batches=(batch,),
        network=between,
        memory_bandwidth=bandwidth,
    )
    stages = [Stage(row.first_layer, row.last_layer + 1, config.num_layers) for row in plan.ranks]
    reads = StepReads(config, "fp32", "fp32", bandwidth)
    return SimulatedRow(
        count, batch, network, _simulated(decoder, stages, reads, between, batch, new_tokens), plan.speeds[0].pipeline
    )


def _simulated(
    decoder: Decoder, stages: Sequence[Stage], reads: StepReads, network: Network, batch: int, new_tokens: int
) -> float:
    """Tokens a second of `batch` sequences that decode."""
    specs = decoder.config.specs("fp32")
    pages = batch * -(-(_PROMPT + new_tokens) // PAGE_SIZE) + batch
    parts = [_part(decoder, stage) for stage in stages]
    caches = [PagedCache(stage.own(specs), pages, model_specs=specs) for stage in stages]
    queues: list[deque[tuple[float, Message]]] = [deque() for _ in stages]
    rings = [_TimedRing(rank, queues, network, reads, stage) for rank, stage in enumerate(stages)]
    rings[0].loops = [
        StageLoop(part, cache, cast(Any, ring))
        for part, cache, ring in zip(parts[1:], caches[1:], rings[1:], strict=True)
    ]
    ranks = SimpleNamespace(ring=rings[0], lost=None, loss=_itself, leave=_nothing)
    engine = Engine(parts[0], caches[0], pipeline=Pipeline(cast(Ranks, ranks)) if len(stages) > 1 else None)
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    for first in range(batch):
        prompt = [3 + (first + i) % 100 for i in range(_PROMPT)]
        engine.add(Request.create(prompt, params, vocab_size=decoder.config.vocab_size, max_context=4096))
    counted, began, clock = 0, 0.0, rings[0]
    while engine.num_running or engine.num_waiting:
        before = engine.counters.read_tokens
        events = engine.step()
        if len(stages) == 1 and engine.counters.read_tokens > before:
            clock.now += reads.seconds(stages[0], [_PROMPT + new_tokens // 2] * len(events))
        counted += len(events)
        if counted >= _SETTLED * batch and not began:
            began, counted_at = clock.now, counted
            continue
        if counted >= (new_tokens - 1) * batch:
            return (counted - counted_at) / (clock.now - began)  # pyright: ignore[reportPossiblyUnboundVariable]
    return 0.0


class _TimedRing:
    """A rank's place among queues, and its clock. The driver's has the others compute while it waits."""

    def __init__(
        self, rank: int, queues: list[deque[tuple[float, Message]]], network: Network, reads: StepReads, stage: Stage
    ) -> None:
        self.rank, self.size = rank, len(queues)
        self.before, self.after = (rank - 1) % self.size, (rank + 1) % self.size
        self.now = 0.0
        self.loops: list[StageLoop] = []
        self._queues, self._network, self._reads, self._stage = queues, network, reads, stage

    def send(self, message: Message) -> None:
        """After the time that this rank's layers take."""
        if message.kind == Kind.STEP:
            batch, _ = batch_of(message.numbers)
            self.now += self._reads.seconds(self._stage, batch.kv_lens)
        head, body = message.head(), message.body()
        arrival = self.now + self._network.seconds(head.nbytes + body.nbytes)
        self._queues[self.after].append((arrival, message_of(head, body)))

    def receive(self) -> Message:
        """Not before it has arrived."""
        while not self._queues[self.rank]:
            for loop, queue in zip(self.loops, self._queues[1:], strict=True):
                if queue:
                    loop.turn()
        arrival, message = self._queues[self.rank].popleft()
        self.now = max(self.now, arrival)
        return message

    def arrived(self, number: int) -> None:
        """Nothing is kept."""

    def flush(self) -> None:
        """Nothing is under way."""


def _part(decoder: Decoder, stage: Stage) -> Decoder:
    """A stage of a decoder, with the same weights."""
    with torch.device("meta"):
        part = Decoder(decoder.config)
    part.keep_stage(stage)
    state = decoder.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()}, assign=True)
    return part.eval().requires_grad_(False)


def _itself(error: RankError) -> RankError:
    return error


def _nothing() -> None:
    pass
