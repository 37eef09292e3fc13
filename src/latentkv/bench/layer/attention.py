"""One decode step of one attention layer: LatentKV beside transformers and beside MHA that caches whole heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.bench.ceilings import Ceilings, measure_ceilings
from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.layer.contenders import (
    LATENTKV,
    MHA_MATMUL,
    MHA_SDPA,
    TRANSFORMERS,
    Entry,
    latentkv_entry,
    mha_entries,
    transformers_entry,
)
from latentkv.bench.ops.decode_case import DecodeCase
from latentkv.bench.shapes import AttentionShape
from latentkv.bench.timing import Contender, Timing, time_interleaved, torch_threads
from latentkv.errors import OpError, RequestError
from latentkv.state.spec import KVFormat

CONTEXTS = (1024, 8192, 32768)
TRANSFORMERS_ATTENTIONS = ("sdpa", "eager")
CONTENDERS = (LATENTKV, TRANSFORMERS, MHA_SDPA, MHA_MATMUL)
TOLERANCE: Mapping[KVFormat, float] = {"fp32": 0.03, "bf16": 0.03, "fp16": 0.03, "int8": 0.06, "fp8": 0.12}
"""Largest error, over the largest output, that rounding explains: bf16 arithmetic, then the cache's own format."""


@dataclass(frozen=True)
class Measurement:
    """What one contender did at one context.

    Attributes:
        ms: median milliseconds of a step.
        spread: interquartile range over the median.
        gflop: arithmetic of a step of its form, GFLOP.
        gflops: the same a second, GFLOP/s.
        of_bf16_ceiling: gflops over this machine's bf16 matrix product.
        gbps: the layer's weights and the cache, each read once, over the time, GB/s.
        of_read_ceiling: gbps over this machine's read bandwidth; above 1 where the weights stay in the CPU's cache.
        cache_bytes: what the cache has really allocated.
        planned_cache_bytes: what `plan` says.
        max_error: largest difference from the float64 answer, over the largest element of it.
        times_faster_than_transformers: transformers' median over this one; None where it was not run.
    """

    ms: float
    spread: float
    gflop: float
    gflops: float
    of_bf16_ceiling: float
    gbps: float
    of_read_ceiling: float
    cache_bytes: int
    planned_cache_bytes: int
    max_error: float
    times_faster_than_transformers: float | None


@dataclass(frozen=True)
class AttentionRow:
    """One line of the table; `measured` is None where `note` says why nothing was."""

    contender: str
    context: int
    measured: Measurement | None
    note: str = ""


@dataclass(frozen=True)
class AttentionReport:
    """The whole comparison, with what is needed to repeat it."""

    environment: Environment
    ceilings: Ceilings
    shape: AttentionShape
    kv_dtype: KVFormat
    transformers_attention: str
    repeats: int
    rows: tuple[AttentionRow, ...]


def measure_attention(
    shape: AttentionShape,
    *,
    contexts: Sequence[int] = CONTEXTS,
    kv_format: KVFormat = "bf16",
    repeats: int = 20,
    threads: int | None = None,
    transformers_attention: str = "sdpa",
    ceilings: Ceilings | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> AttentionReport:
    """Compare one decode step, batch 1, bf16 weights, at each context; every output is checked before it is timed.

    Args:
        shape: the layer.
        contexts: cached tokens attended to, the new one included; 2 or more each.
        kv_format: how LatentKV's cache is stored (the others keep bf16).
        repeats: timed rounds.
        threads: torch threads (None: torch's own number).
        transformers_attention: transformers' attn_implementation, "sdpa" or "eager".
        ceilings: of this machine, if just measured; None: measured first.
        progress: told what is being done.

    Raises:
        RequestError: no context, or one below 2, or an unknown `transformers_attention`.
        OpError: an implementation gives another answer, so that its time would mean nothing.
    """
    if not contexts or min(contexts) < 2:
        raise RequestError(f"contexts must be 2 tokens or more each, not {list(contexts)}.")
    if transformers_attention not in TRANSFORMERS_ATTENTIONS:
        known = " or ".join(TRANSFORMERS_ATTENTIONS)
        raise RequestError(f"transformers_attention must be {known}, not {transformers_attention!r}.")
    with torch_threads(threads) as used, torch.inference_mode():
        environment = describe_environment(used)
        if ceilings is None:
            progress("measuring this machine's ceilings")
            ceilings = measure_ceilings(threads=used)
        rows: list[AttentionRow] = []
        for context in contexts:
            progress(f"decoding at {context:,} tokens")
            case = DecodeCase.random(shape, context)
            rows += _measure_case(case, kv_format, repeats, transformers_attention, ceilings)
    return AttentionReport(environment, ceilings, shape, kv_format, transformers_attention, repeats, tuple(rows))


def _measure_case(
    case: DecodeCase, kv_format: KVFormat, repeats: int, transformers_attention: str, ceilings: Ceilings
) -> list[AttentionRow]:
    entries: dict[str, Entry] = {LATENTKV: latentkv_entry(case, kv_format), **mha_entries(case)}
    missing = ""
    try:
        entries[TRANSFORMERS] = transformers_entry(case, transformers_attention)
    except ImportError as error:
        missing = f"not measured ({error}): pip install transformers==5.23.0"
    expected = case.expected()
    errors = {
        name: _checked_error(name, entry, expected, TOLERANCE[kv_format if name == LATENTKV else "bf16"])
        for name, entry in entries.items()
    }
    timings = time_interleaved({n: Contender(e.step, e.prepare) for n, e in entries.items()}, repeats=repeats)
    return [
        AttentionRow(name, case.context, _measurement(name, case, entries[name], timings, errors[name], ceilings))
        if name in entries
        else AttentionRow(name, case.context, None, missing)
        for name in CONTENDERS
    ]


def _checked_error(name: str, entry: Entry, expected: Tensor, tolerance: float) -> float:
    if entry.prepare is not None:
        entry.prepare()
    difference = (entry.step().to(expected.dtype) - expected).abs().max()
    error = float(difference / expected.abs().max())
    # Written so that NaN fails too.
    if not error <= tolerance:
        raise OpError(
            f"{name} differs from the float64 answer by {error:.2%} of its largest element, more than {tolerance:.0%}: "
            "its time would mean nothing."
        )
    return error


def _measurement(
    name: str, case: DecodeCase, entry: Entry, timings: Mapping[str, Timing], error: float, ceilings: Ceilings
) -> Measurement:
    seconds = timings[name].median
    flops = case.shape.step_flops(entry.form, case.context)
    gflops, gbps = flops / seconds / 1e9, (case.weight_bytes + entry.planned_bytes) / seconds / 1e9
    return Measurement(
        ms=seconds * 1e3,
        spread=timings[name].spread,
        gflop=flops / 1e9,
        gflops=gflops,
        of_bf16_ceiling=gflops / ceilings.bf16_gflops,
        gbps=gbps,
        of_read_ceiling=gbps / ceilings.read_gbps,
        cache_bytes=entry.cache_bytes(),
        planned_cache_bytes=entry.planned_bytes,
        max_error=error,
        times_faster_than_transformers=timings[TRANSFORMERS].median / seconds if TRANSFORMERS in timings else None,
    )
