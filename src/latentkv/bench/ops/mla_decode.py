"""The op `mla_decode` alone, beside the same absorbed attention as torch's matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from latentkv import ops
from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Contender, time_interleaved, torch_threads
from latentkv.errors import OpError, RequestError
from latentkv.ops import KVFormat
from latentkv.ops.backends import why_no_int8_products
from latentkv.state.spec import PAGE_SIZE, LatentSpec

LATENT_DIM, ROPE_DIM = 512, 64
"""L and R of every DeepSeek model."""

TORCH = "torch matmul, bf16"
INT8_PRODUCTS = "mla_decode, int8 pages, int8 products"
TOLERANCE: Mapping[str, float] = {
    "fp8": 0.1,
    "int8": 0.04,
    "bf16": 0.02,
    "fp16": 0.02,
    "fp32": 0.02,
    TORCH: 0.05,
    INT8_PRODUCTS: 0.08,
}
"""Largest error, over the largest output, that rounding explains: of the stored latents, and of bf16 arithmetic."""

FROM_MEMORY = 64 << 20
"""Bytes of latents that a timed step reads at least, in as many equal layers as that takes: they come from memory."""

_CHECKED_HEADS = 4


@dataclass(frozen=True)
class DecodeRow:
    """What one contender did in one case.

    Attributes:
        contender: "mla_decode, FORMAT pages", with int8 products where they can be had, or torch.
        heads: H.
        context: cached tokens of each sequence, the new one included.
        batch: sequences.
        ms: median milliseconds of a call.
        spread: interquartile range over the median.
        gflops: 2 H (2 L + R) a cached token and sequence, over the time; GFLOP/s.
        bf16_ceiling: GFLOP/s of a bf16 matrix product, measured in turn with this.
        of_bf16_ceiling: gflops over it.
        gbps: the cache read once, over the time, GB/s.
        read_ceiling: GB/s of reading memory, measured in turn with this.
        of_read_ceiling: gbps over it.
        max_error: largest difference from the float64 answer, over the largest element of it.
        times_faster_than_torch: torch's median over this one.
    """

    contender: str
    heads: int
    context: int
    batch: int
    ms: float
    spread: float
    gflops: float
    bf16_ceiling: float
    of_bf16_ceiling: float
    gbps: float
    read_ceiling: float
    of_read_ceiling: float
    max_error: float
    times_faster_than_torch: float


@dataclass(frozen=True)
class DecodeReport:
    """The whole table, with what is needed to repeat it."""

    environment: Environment
    repeats: int
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True)
class DecodeInputs:
    """One case: bf16 queries [B, 1, H, L + R] and cached latents [B, context, L + R] of every sequence.

    A timed step attends over the caches of `layers` layers in turn, as a model does; they all hold these latents.
    """

    q: Tensor
    latents: Tensor
    layers: int = 1

    @classmethod
    def random(cls, heads: int, context: int, batch: int) -> DecodeInputs:
        """Scores spread over a few units, so that a wrong key shows in the output."""
        generator = torch.Generator().manual_seed(0)
        width = LATENT_DIM + ROPE_DIM
        latents = torch.empty(batch, context, width, dtype=torch.bfloat16).normal_(generator=generator)
        q = torch.randn(batch, 1, heads, width, generator=generator).bfloat16() * 2
        return cls(q, latents, layers=-(-FROM_MEMORY // latents.nbytes))

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return (LATENT_DIM + ROPE_DIM) ** -0.5

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 2 * self.q.shape[2] * (2 * LATENT_DIM + ROPE_DIM) * self.latents.shape[1] * self.latents.shape[0]

    def expected(self) -> Tensor:
        """The answer for a few heads [B, few, L] in float64."""
        rows: list[Tensor] = []
        for q, latents in zip(self.q[:, 0, self.checked_heads()].double(), self.latents, strict=True):
            cached = latents.double()
            rows.append((q @ cached.T * self.scale).softmax(-1) @ cached[:, :LATENT_DIM])
        return torch.stack(rows)

    def checked_heads(self) -> list[int]:
        """Heads whose output is checked: the first, the last and some between."""
        heads = self.q.shape[2]
        return sorted({round(i * (heads - 1) / (_CHECKED_HEADS - 1)) for i in range(_CHECKED_HEADS)})


def measure_mla_decode(
    *,
    heads: Sequence[int] = (16, 128),
    contexts: Sequence[int] = (8192, 32768, 131072),
    batches: Sequence[int] = (1, 4),
    kv_formats: Sequence[KVFormat] = ("bf16", "int8", "fp8"),
    repeats: int = 10,
    threads: int | None = None,
    probe: CeilingProbe | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> DecodeReport:
    """Time one decode step of attention over a filled cache, L + R = 512 + 64; every output is checked first.

    Args:
        heads: numbers of heads.
        contexts: cached tokens of each sequence.
        batches: numbers of sequences.
        kv_formats: how the pages are stored.
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        probe: of the ceilings, which are measured in turn with the contenders; None: of the usual size.
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure.
        OpError: an answer is wrong, so that its time would mean nothing.
    """
    unknown = [name for name in kv_formats if name not in get_args(KVFormat)]
    if unknown or not (heads and contexts and batches and kv_formats) or min(*heads, *contexts, *batches) < 1:
        raise RequestError(
            f"Nothing to measure: heads {list(heads)}, contexts {list(contexts)}, batches {list(batches)}, "
            f"formats {list(kv_formats)}; use numbers from 1 and the formats {', '.join(get_args(KVFormat))}."
        )
    with torch_threads(threads) as used, torch.inference_mode():
        environment = describe_environment(used)
        probe = probe or CeilingProbe()
        rows: list[DecodeRow] = []
        for h in heads:
            for context in contexts:
                for batch in batches:
                    progress(f"{h} heads, {context:,} tokens, batch {batch}")
                    rows += _measure(DecodeInputs.random(h, context, batch), kv_formats, repeats, probe)
    return DecodeReport(environment, repeats, tuple(rows))


def _measure(
    inputs: DecodeInputs, kv_formats: Sequence[KVFormat], repeats: int, probe: CeilingProbe
) -> list[DecodeRow]:
    entries = {f"mla_decode, {name} pages": mla_decode_entry(inputs, name) for name in kv_formats}
    if "int8" in kv_formats and why_no_int8_products(inputs.q.device) is None:
        entries[INT8_PRODUCTS] = mla_decode_entry(inputs, "int8", int8_products=True)
    entries[TORCH] = torch_entry(inputs)
    expected = inputs.expected()
    errors = {name: _checked_error(name, inputs, entry, expected) for name, entry in entries.items()}
    contenders = {name: Contender(entry.all_layers, prepare=entry.last_layer) for name, entry in entries.items()}
    timings = time_interleaved(contenders | probe.contenders, repeats=repeats)
    bf16_ceiling, read_ceiling = probe.rates(timings)
    rows: list[DecodeRow] = []
    for name, entry in entries.items():
        seconds = timings[name].median / inputs.layers
        gflops, gbps = inputs.flops / seconds / 1e9, entry.cache_bytes / seconds / 1e9
        rows.append(
            DecodeRow(
                name,
                heads=inputs.q.shape[2],
                context=inputs.latents.shape[1],
                batch=inputs.latents.shape[0],
                ms=seconds * 1e3,
                spread=timings[name].spread,
                gflops=gflops,
                bf16_ceiling=bf16_ceiling,
                of_bf16_ceiling=gflops / bf16_ceiling,
                gbps=gbps,
                read_ceiling=read_ceiling,
                of_read_ceiling=gbps / read_ceiling,
                max_error=errors[name],
                times_faster_than_torch=timings[TORCH].median / inputs.layers / seconds,
            )
        )
    return rows


@dataclass(frozen=True)
class DecodeEntry:
    """One contender.

    Attributes:
        layer: attends over one layer's cache, -> [B, H, L].
        caches: of the layers.
        cache_bytes: of the cached tokens of one layer.
        tolerance: largest error, over the largest output, that rounding explains.
    """

    layer: Callable[[Tensor], Tensor]
    caches: list[Tensor]
    cache_bytes: int
    tolerance: float

    def last_layer(self) -> None:
        """Before a timed step: after another contender's turn the first call finds neither code nor scratch memory."""
        self.layer(self.caches[-1])

    def all_layers(self) -> None:
        """One timed step."""
        for cache in self.caches:
            self.layer(cache)


def mla_decode_entry(inputs: DecodeInputs, kv_format: KVFormat, *, int8_products: bool = False) -> DecodeEntry:
    """`mla_decode` over pages in no order, as after hours of serving."""
    batch, context, _ = inputs.latents.shape
    spec = LatentSpec(LATENT_DIM, ROPE_DIM, kv_format)
    pages_each = -(-context // PAGE_SIZE)
    caches = [spec.allocate(batch * pages_each, PAGE_SIZE) for _ in range(inputs.layers)]
    order = torch.randperm(batch * pages_each, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, pages_each).to(torch.int32)
    tokens = torch.arange(context)
    for row, latents in zip(table.long(), inputs.latents, strict=True):
        slots = row[tokens // PAGE_SIZE] * PAGE_SIZE + tokens % PAGE_SIZE
        c, k_rope = latents.split([LATENT_DIM, ROPE_DIM], dim=-1)
        ops.write_latents(caches[0], slots, c, k_rope, kv_format=kv_format)
    for cache in caches[1:]:
        cache.copy_(caches[0])
    lens = torch.full((batch,), context, dtype=torch.int32)

    def layer(pages: Tensor) -> Tensor:
        out, _ = ops.mla_decode(
            inputs.q,
            pages,
            table,
            lens,
            latent_dim=LATENT_DIM,
            scale=inputs.scale,
            kv_format=kv_format,
            int8_products=int8_products,
        )
        return out[:, 0]

    tolerance = TOLERANCE[INT8_PRODUCTS if int8_products else kv_format]
    return DecodeEntry(layer, caches, batch * context * spec.token_bytes, tolerance)


def torch_entry(inputs: DecodeInputs) -> DecodeEntry:
    """Q K^T, softmax in float32, then times the latents: bf16 products over latents that lie one after the other."""
    q = inputs.q[:, 0]

    def layer(latents: Tensor) -> Tensor:
        scores = (q @ latents.transpose(1, 2)).float() * inputs.scale
        return scores.softmax(-1).to(q.dtype) @ latents[..., :LATENT_DIM]

    caches = [inputs.latents, *(inputs.latents.clone() for _ in range(inputs.layers - 1))]
    return DecodeEntry(layer, caches, inputs.latents.nbytes, TOLERANCE[TORCH])


def _checked_error(name: str, inputs: DecodeInputs, entry: DecodeEntry, expected: Tensor) -> float:
    """Largest difference from the float64 answer, over its largest element, in the last layer."""
    out = entry.layer(entry.caches[-1])[:, inputs.checked_heads()]
    error = float((out.double() - expected).abs().max() / expected.abs().max())
    if not error <= entry.tolerance:  # written so that NaN fails too
        raise OpError(
            f"{name} differs from the float64 answer by {error:.2%} of its largest element, more than "
            f"{entry.tolerance:.0%}: its time would mean nothing."
        )
    return error
