"""A whole model: how fast it reads a prompt and writes after it, at several depths, and what memory that takes."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Timing, torch_threads
from latentkv.engine import SamplingParams
from latentkv.errors import RequestError
from latentkv.llm import LLM

DEPTHS = (128, 512, 2048)


@dataclass(frozen=True)
class ModelRow:
    """Medians at one depth, one sequence at a time.

    Attributes:
        depth: tokens of the prompt.
        prefill_tokens_per_second: prompt tokens over the time to the first token.
        prefill_spread: interquartile range over the median.
        first_token_ms: milliseconds from the request to its first token.
        decode_tokens_per_second: of the tokens after the first.
        decode_spread: interquartile range over the median.
        cache_bytes: of the pages that hold the prompt and the new tokens.
    """

    depth: int
    prefill_tokens_per_second: float
    prefill_spread: float
    first_token_ms: float
    decode_tokens_per_second: float
    decode_spread: float
    cache_bytes: int


@dataclass(frozen=True)
class ModelReport:
    """The measurement of one model, with what is needed to repeat it; sizes in bytes."""

    environment: Environment
    model: str
    parameters: int
    dtype: str
    kv_dtype: str
    new_tokens: int
    repeats: int
    bytes_per_token: int
    allocated_cache_bytes: int
    peak_rss_bytes: int
    rows: tuple[ModelRow, ...]


def measure_model(
    llm: LLM,
    *,
    name: str,
    depths: Sequence[int] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelReport:
    """Time greedy generation after random prompts; each run has a prompt of its own, so that no prefix is ever shared.

    Args:
        llm: the model.
        name: how to call it.
        depths: tokens of the prompts; None: those of `DEPTHS` that fit the model's context and cache.
        new_tokens: tokens generated after each, 2 or more.
        repeats: timed rounds over all depths.
        threads: torch threads (None: torch's own number).
        progress: told what is being done.

    Raises:
        RequestError: nothing to measure, or a depth that does not fit.
    """
    cache = llm.cache
    room = min(llm.max_context, cache.num_pages * cache.page_size) - new_tokens
    depths = tuple(d for d in DEPTHS if d <= room) if depths is None else tuple(depths)
    if not depths or min(depths) < 1 or new_tokens < 2 or repeats < 1:
        raise RequestError(
            f"Nothing to measure: depths {list(depths)}, {new_tokens} new tokens, {repeats} repeats; "
            f"use depths from 1 to {room:,}, 2 new tokens or more and 1 repeat or more."
        )
    if max(depths) > room:
        raise RequestError(f"A depth of {max(depths):,} and {new_tokens} new tokens do not fit: at most {room:,} do.")
    prefill: dict[int, list[float]] = {depth: [] for depth in depths}
    decode: dict[int, list[float]] = {depth: [] for depth in depths}
    with torch_threads(threads) as used:
        environment = describe_environment(used)
        for round_index in range(repeats + 1):
            progress(f"round {round_index} of {repeats}" if round_index else "warming up")
            for depth in depths:
                first, rest = time_request(llm, _prompt(llm, depth, seed=round_index), new_tokens)
                if round_index:
                    prefill[depth].append(first)
                    decode[depth].append(rest)
    return ModelReport(
        environment=environment,
        model=name,
        parameters=sum(p.numel() for p in llm.decoder.parameters()),
        dtype=str(llm.decoder.dtype).removeprefix("torch."),
        kv_dtype=cache.format,
        new_tokens=new_tokens,
        repeats=repeats,
        bytes_per_token=cache.bytes_per_token,
        allocated_cache_bytes=cache.allocated_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        rows=tuple(
            _row(llm, depth, new_tokens, Timing(tuple(prefill[depth])), Timing(tuple(decode[depth])))
            for depth in depths
        ),
    )


def time_request(llm: LLM, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first of `new_tokens` new tokens, and from there to the last."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    times = [time.perf_counter() for piece in llm.stream(prompt, params) if piece.token_ids]
    return times[0] - started, times[-1] - times[0]


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, Linux in KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def _prompt(llm: LLM, depth: int, *, seed: int) -> list[int]:
    return random.Random(f"{seed}/{depth}").choices(range(llm.config.vocab_size), k=depth)


def _row(llm: LLM, depth: int, new_tokens: int, prefill: Timing, decode: Timing) -> ModelRow:
    cache = llm.cache
    return ModelRow(
        depth=depth,
        prefill_tokens_per_second=depth / prefill.median,
        prefill_spread=prefill.spread,
        first_token_ms=prefill.median * 1e3,
        decode_tokens_per_second=(new_tokens - 1) / decode.median,
        decode_spread=decode.spread,
        cache_bytes=cache.pages_for(depth + new_tokens) * cache.page_size * cache.bytes_per_token,
    )
