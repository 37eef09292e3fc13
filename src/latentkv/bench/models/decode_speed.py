"""Models beside each other on this machine: how fast each decodes at one depth, by this package's own path."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from latentkv.bench.models.contenders import OwnDecoder
from latentkv.bench.timing import Contender, time_interleaved
from latentkv.llm import LLM
from latentkv.models.config_reader import read_config
from latentkv.state.spec import KVFormat

DEPTH = 4096
"""Tokens in the cache, where the models take so many."""


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens a second of one sequence.

    Attributes:
        tokens_per_second: {name: median over the rounds}.
        spread: {name: interquartile range over the median}.
        depth: tokens in the cache before the first step; made up, not computed.
        new_tokens: steps of a round.
        repeats: timed rounds, the models in turn.
        threads: of torch.
        dtype: of the weights and of the cache.
    """

    tokens_per_second: Mapping[str, float]
    spread: Mapping[str, float]
    depth: int
    new_tokens: int
    repeats: int
    threads: int
    dtype: KVFormat


def measure_decode(
    folders: Mapping[str, Path], dtype: torch.dtype, *, depth: int = DEPTH, new_tokens: int = 16, repeats: int = 7
) -> DecodeSpeed:
    """Time decode steps of several models in turn; all are in memory at once.

    Args:
        folders: of the models, by name.
        dtype: of the weights and of the cache.
        depth: tokens in the cache at most; fewer where a model takes fewer.
        new_tokens: steps of a round.
        repeats: timed rounds.
    """
    longest = min(depth + new_tokens, *(read_config(folder).max_positions for folder in folders.values()))
    llms = {name: LLM(folder, dtype=dtype, max_context=longest, packed_dir=None) for name, folder in folders.items()}
    with torch.inference_mode(), ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, llm in llms.items():
            decoder = OwnDecoder(llm.decoder, llm.cache)
            stack.callback(decoder.close)
            contenders[name] = Contender(partial(decoder.decode, longest - new_tokens, new_tokens))
        timings = time_interleaved(contenders, repeats=repeats)
    return DecodeSpeed(
        {name: new_tokens / timing.median for name, timing in timings.items()},
        {name: timing.spread for name, timing in timings.items()},
        depth=longest - new_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=torch.get_num_threads(),
        dtype=next(iter(llms.values())).cache.format,
    )
