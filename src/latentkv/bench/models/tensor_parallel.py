"""What ranks that share layers out bring: a model in all of them beside the same one in the first alone, in turn."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Timing
from latentkv.engine import SamplingParams
from latentkv.engine.engine import Event
from latentkv.errors import RequestError
from latentkv.llm import LLM
from latentkv.options import LLMOptions

_WARMUP = 1
_ANSWER_SECONDS = 600


@dataclass(frozen=True)
class TensorParallelRow:
    """One kind of work.

    Attributes:
        work: "prompt" or "token".
        one_ms: milliseconds of the first rank alone; the median.
        all_ms: of all ranks together.
        one_spread: interquartile range over the median.
        all_spread: likewise.
    """

    work: str
    one_ms: float
    all_ms: float
    one_spread: float
    all_spread: float

    @property
    def times(self) -> float:
        """How many times as fast all ranks are."""
        return self.one_ms / self.all_ms


@dataclass(frozen=True)
class TensorParallelReport:
    """All rows, and how they were taken.

    Attributes:
        model: its name.
        weights: as asked for; None: as they are stored.
        ranks: processes.
        threads: of each.
        prompt_tokens: of a prompt, read in one go.
        new_tokens: decoded after it.
        rounds: timed ones, both in turn.
        rows: a prompt, and a token.
        environment: where.
    """

    model: str
    weights: str | None
    ranks: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    rows: tuple[TensorParallelRow, ...]
    environment: Environment


def measure_tensor_parallel(
    options: LLMOptions,
    ranks: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> TensorParallelReport:
    """Measure in all ranks of a team, of which the first returns; the others end (`SystemExit`).

    Args:
        options: of the model; its threads are those of each rank.
        ranks: that there are.
        prompt_tokens: of a prompt.
        new_tokens: decoded after it, at least 2.
        rounds: timed ones.

    Raises:
        RequestError: a number is out of range.
        LatentKVError: the model cannot be loaded, or not shared out so.
    """
    if min(prompt_tokens, rounds) < 1 or new_tokens < 2:
        raise RequestError("A prompt has 1 token at least, a completion 2, and there is 1 round or more.")
    threads = options.threads or 1
    environment = describe_environment(threads)
    options = replace(options, threads=threads, max_context=prompt_tokens + new_tokens)
    torch.set_num_threads(threads)
    together = LLM(**vars(replace(options, tensor_parallel=ranks)))
    alone = LLM(**vars(options))
    taken: dict[LLM, list[tuple[float, float]]] = {alone: [], together: []}
    generator = torch.Generator().manual_seed(0)
    try:
        for number in range(_WARMUP + rounds):
            for llm, times in taken.items():
                # Another one each time: what was read before would not be read again.
                prompt = torch.randint(llm.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
                found = _answer_seconds(llm, prompt, new_tokens)
                if number >= _WARMUP:
                    times.append(found)
    finally:
        together.close()
        alone.close()
    rows = [
        TensorParallelRow(work, one.median * 1e3, all_.median * 1e3, one.spread, all_.spread)
        for index, work in enumerate(("prompt", "token"))
        for one, all_ in [[Timing(tuple(times[index] for times in taken[llm])) for llm in (alone, together)]]
    ]
    name = Path(str(options.model)).name
    return TensorParallelReport(
        name, options.weights, ranks, threads, prompt_tokens, new_tokens, rounds, tuple(rows), environment
    )


def _answer_seconds(llm: LLM, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of each of the others."""
    came: list[float] = []
    failed: list[Exception] = []
    done = threading.Event()

    def listen(event: Event | Exception) -> None:
        came.append(time.perf_counter())
        if isinstance(event, Exception):
            failed.append(event)
        if isinstance(event, Exception) or event.finish_reason:
            done.set()

    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    llm.thread.submit(llm.request(prompt, params), listen)
    done.wait(_ANSWER_SECONDS)
    if failed:
        raise failed[0]
    return came[0] - began, (came[-1] - came[0]) / (len(came) - 1)
