"""How fast the trained models decode over a deep cache: one after another, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from latentkv.bench.model_contenders import OwnDecoder
from latentkv.bench.timing import Contender, time_interleaved
from latentkv.llm import LLM

DEPTH = 4096
"""Tokens in the cache."""
TOKENS = 32
"""Of one timed round."""
ROUNDS = 9
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Speed:
    """Of one sequence, weights and cache in bf16.

    Attributes:
        tokens_per_second: median of the rounds.
        spread: interquartile range over the median.
    """

    tokens_per_second: float
    spread: float


def measure_speeds(models: Mapping[str, Path]) -> dict[str, Speed]:
    """Decode with each of the models, `DEPTH` tokens in the cache; what those tokens are costs no time."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, folder in models.items():
            llm = LLM(folder, dtype="bf16", kv_dtype="bf16", kv_cache_bytes=_CACHE_BYTES)
            decoder = OwnDecoder(llm.decoder, llm.cache)
            stack.callback(decoder.close)
            contenders[name] = Contender(lambda decoder=decoder: decoder.decode(DEPTH, TOKENS))
        timings = time_interleaved(contenders, repeats=ROUNDS)
    return {name: Speed(TOKENS / timing.median, timing.spread) for name, timing in timings.items()}
