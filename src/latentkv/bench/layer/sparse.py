"""One decode step of a layer of sparse attention beside the same layer that reads every token, and its parts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast
from zlib import crc32

import torch
from torch import Tensor

from latentkv import ops
from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Contender, time_interleaved, torch_threads
from latentkv.errors import OpError, RequestError
from latentkv.models.batch import Batch
from latentkv.models.config import IndexerConfig, LayerConfig, MLAConfig, ModelConfig, RopeConfig
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.packing import choose_packing, pack_module
from latentkv.models.rope import rotary
from latentkv.ops import reference
from latentkv.state import IndexSpec, KVFormat, LayerState, PagedCache

DENSE, SPARSE = "dense layer", "sparse layer"
CHOICE, CHOSEN = "  scores and choice", "  attention to the chosen"

FROM_MEMORY = 64 << 20
"""Bytes of index keys that a timed step reads at least, in as many layers as that takes: they come from memory."""

_SLACK, _INT8_SLACK = 1e-5, 0.02
"""How far below the best that was left out a chosen score may lie, over the largest: what rounding explains."""


@dataclass(frozen=True)
class SparseRow:
    """What one contender did at one context.

    Attributes:
        contender: a whole layer with its projections, or a part of the sparse one.
        context: cached tokens, the new one included.
        ms: median milliseconds of a step.
        spread: interquartile range over the median.
        gflops: arithmetic of its products over the time, GFLOP/s.
        of_bf16_ceiling: the same over a bf16 matrix product, measured in turn with this.
        gbps: the weights, keys and latents that it needs, each read once, over the time, GB/s.
        of_read_ceiling: the same over reading memory, measured in turn with this.
        of_dense_time: the dense layer's median over this one.
    """

    contender: str
    context: int
    ms: float
    spread: float
    gflops: float
    of_bf16_ceiling: float
    gbps: float
    of_read_ceiling: float
    of_dense_time: float


@dataclass(frozen=True)
class SparseReport:
    """The whole table, with what is needed to repeat it."""

    environment: Environment
    model_type: str
    kv_dtype: KVFormat
    topk: int
    repeats: int
    rows: tuple[SparseRow, ...]


@dataclass(frozen=True)
class _Part:
    """Something to time: the step over one layer's memory, its multiply-adds and the bytes it needs."""

    step: Callable[[LayerState], object]
    products: int
    bytes: int


def measure_sparse(
    config: ModelConfig,
    *,
    contexts: Sequence[int] = (65536, 131072),
    kv_format: KVFormat = "bf16",
    repeats: int = 10,
    threads: int | None = None,
    probe: CeilingProbe | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> SparseReport:
    """Time one decode step, batch 1, random bf16 weights, at each context; the choice is checked first.

    Args:
        config: of a model whose first layer has an indexer.
        contexts: cached tokens of the sequence, the new one included.
        kv_format: how the cache is stored.
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        probe: of the ceilings, which are measured in turn with the contenders; None: of the usual size.
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure, or a model that reads every token.
        OpError: another choice than the float64 definition's, so that its time would mean nothing.
    """
    layer = config.layers[0]
    if any(each.indexer and each.indexer.pool for each in config.layers):
        raise RequestError(
            f"{config.model_type} chooses pools of tokens, which is not timed here: give a model with a key a token."
        )
    if layer.own_indexer is None or layer.rope is None or not isinstance(layer.attention, MLAConfig):
        raise RequestError(f"{config.model_type} reads every token: give a model with an indexer.")
    if not contexts or min(contexts) <= layer.own_indexer.topk:
        raise RequestError(f"contexts must be longer than the {layer.own_indexer.topk} tokens that are chosen.")
    with torch_threads(threads) as used, torch.inference_mode():
        environment = describe_environment(used)
        probe = probe or CeilingProbe()
        rows: list[SparseRow] = []
        for context in contexts:
            progress(f"{context:,} tokens")
            rows += _measure(
                _Case(config, layer, layer.attention, layer.own_indexer, context, kv_format), repeats, probe
            )
    return SparseReport(environment, config.model_type, kv_format, layer.own_indexer.topk, repeats, tuple(rows))


class _Case:
    """A layer with and without its indexer, over caches that hold the same random tokens."""

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        mla: MLAConfig,
        indexer: IndexerConfig,
        context: int,
        kv_format: KVFormat,
    ) -> None:
        self.heads, self.mla, self.indexer, self.context = config.num_heads, mla, indexer, context
        self.dense, self.sparse = (_attention(config, layer, mla, own) for own in (None, indexer))
        spec = layer.spec(kv_format)
        self.key_bytes = cast(IndexSpec, spec.index).token_bytes
        self.latent_bytes = spec.token_bytes - self.key_bytes
        self.cache = PagedCache([spec] * -(-FROM_MEMORY // (context * self.key_bytes)), -(-context // 64))
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.cache.num_pages, generator=generator).tolist()
        pages = self.cache.pool.allocate(self.cache.num_pages)
        self.batch = Batch.build([[0]], [context - 1], [[pages[i] for i in order]], page_size=self.cache.page_size)
        self.positions = rotary(cast(RopeConfig, layer.rope), torch.tensor([context - 1]), max_context=context)
        self.x = torch.randn(1, config.hidden_size, generator=generator).bfloat16()
        self._fill(generator)
        self.q = torch.randn(1, self.heads, mla.kv_lora_rank + mla.qk_rope_head_dim, generator=generator).bfloat16()
        self.index_q = torch.randn(1, indexer.num_heads, indexer.head_dim, generator=generator).bfloat16()
        self.weights = torch.randn(1, indexer.num_heads, generator=generator)

    def _fill(self, generator: torch.Generator) -> None:
        """Random latents and keys in the first layer's memory; the others' is a copy."""
        slots, dim, own = torch.arange(self.context), self.indexer.head_dim, self.cache.view(0)
        latents = torch.randn(self.context, self.mla.kv_lora_rank, generator=generator).bfloat16()
        k_rope = torch.randn(self.context, self.mla.qk_rope_head_dim, generator=generator).bfloat16()
        keys, none = torch.randn(self.context, dim, generator=generator), torch.empty(self.context, 0)
        norm = torch.ones(dim), torch.zeros(dim), 1e-6
        ops.write_latents(own.pages, slots, latents, k_rope, kv_format=own.kv_format)
        ops.write_index_keys(_keys(own), slots, keys, *norm, none, none, interleaved=False)
        for index in range(1, len(self.cache.specs)):
            for memory, filled in zip(self.cache.view(index).tensors, own.tensors, strict=True):
                memory.copy_(filled)

    def attend(self, module: MultiHeadLatentAttention, state: LayerState) -> Tensor:
        """A whole layer's step."""
        return module.attend(self.x, self.positions, self.batch, state)

    def choose(self, state: LayerState) -> Tensor:
        """Slots [1, topk]."""
        batch = self.batch
        return ops.select_slots(
            self.index_q,
            self.weights,
            _keys(state),
            batch.block_table,
            batch.q_start,
            batch.stop,
            topk=self.indexer.topk,
        )

    def attend_chosen(self, slots: Tensor, state: LayerState) -> Tensor:
        """Absorbed attention [1, H, L] to some slots."""
        batch, mla = self.batch, self.mla
        return ops.mla_attend(
            self.q,
            state.pages,
            batch.block_table,
            batch.q_start,
            batch.stop,
            latent_dim=mla.kv_lora_rank,
            scale=(mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5,
            kv_format=state.kv_format,
            slots=slots,
        )[0]

    def parts(self) -> dict[str, _Part]:
        """What is timed, by name."""
        mla, indexer, topk = self.mla, self.indexer, self.indexer.topk
        slots = self.choose(self.cache.view(0))
        pair = self.heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
        score = indexer.num_heads * indexer.head_dim * self.context
        dense, sparse = self.dense[1], self.sparse[1]
        latents, keys = self.latent_bytes, self.key_bytes * self.context
        return {
            DENSE: _Part(
                partial(self.attend, self.dense[0]), dense + pair * self.context, 2 * dense + latents * self.context
            ),
            SPARSE: _Part(
                partial(self.attend, self.sparse[0]), sparse + pair * topk + score, 2 * sparse + latents * topk + keys
            ),
            CHOICE: _Part(self.choose, score, keys),
            CHOSEN: _Part(partial(self.attend_chosen, slots), pair * topk, latents * topk),
        }

    def check(self) -> None:
        """Raise `OpError` unless what is chosen are the best by the float64 definition."""
        state = self.cache.view(len(self.cache.specs) - 1)
        table = self.batch.block_table[0].long()
        tokens = torch.arange(self.context)
        size = self.cache.page_size
        slots = table[tokens // size] * size + tokens % size
        keys = _keys(state).flatten(0, 1)[slots]
        keys = reference.decode_index_keys(keys) if keys.dtype == torch.int8 else keys
        scores = reference.index_scores(self.index_q[0], self.weights[0], keys)
        is_chosen = torch.isin(slots, self.choose(state)[0].long())
        slack = (_INT8_SLACK if _keys(state).dtype == torch.int8 else _SLACK) * scores.abs().max()
        if int(is_chosen.sum()) != self.indexer.topk or scores[is_chosen].min() < scores[~is_chosen].max() - slack:
            raise OpError("other tokens than the best were chosen: the time would mean nothing.")


def _measure(case: _Case, repeats: int, probe: CeilingProbe) -> list[SparseRow]:
    case.check()
    parts = case.parts()
    states = [case.cache.view(index) for index in range(len(case.cache.specs))]

    def step(part: _Part) -> None:
        for state in states:
            part.step(state)

    contenders = {
        name: Contender(partial(step, part), prepare=partial(part.step, states[-1])) for name, part in parts.items()
    }
    timings = time_interleaved(contenders | probe.contenders, repeats=repeats)
    bf16_ceiling, read_ceiling = probe.rates(timings)
    rows: list[SparseRow] = []
    for name, part in parts.items():
        seconds = timings[name].median / len(states)
        gflops, gbps = 2 * part.products / seconds / 1e9, part.bytes / seconds / 1e9
        rows.append(
            SparseRow(
                name,
                context=case.context,
                ms=seconds * 1e3,
                spread=timings[name].spread,
                gflops=gflops,
                of_bf16_ceiling=gflops / bf16_ceiling,
                gbps=gbps,
                of_read_ceiling=gbps / read_ceiling,
                of_dense_time=timings[DENSE].median / timings[name].median,
            )
        )
    return rows


def _keys(state: LayerState) -> Tensor:
    """Of a layer that has an indexer."""
    return cast(Tensor, state.index_keys)


def _attention(
    config: ModelConfig, layer: LayerConfig, mla: MLAConfig, indexer: IndexerConfig | None
) -> tuple[MultiHeadLatentAttention, int]:
    """A layer packed as a loaded model's is, and how many weights a step multiplies by; equal names, equal weights."""
    with torch.device("meta"):
        module = MultiHeadLatentAttention(
            config.hidden_size,
            config.num_heads,
            kv_lora_rank=mla.kv_lora_rank,
            qk_nope_head_dim=mla.qk_nope_head_dim,
            qk_rope_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim,
            q_lora_rank=mla.q_lora_rank,
            rope=layer.rope,
            norm_eps=mla.latent_norm_eps,
            max_context=config.max_positions,
            indexer=indexer,
            output_gate=mla.output_gate,
            sinks=mla.sinks,
        )
    module = module.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for name, weight in module.named_parameters():
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        weight.normal_(generator=generator).mul_(weight.shape[-1] ** -0.5 if weight.ndim == 2 else 1)
    module.keep_exact()
    if module.indexer is not None:
        module.indexer.weights_proj.float()
        module.indexer.keep_exact()
    weights = sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
    packing = choose_packing(None, torch.bfloat16, torch.device("cpu"))
    if packing is not None:
        pack_module(module, packing)
    return module, weights
