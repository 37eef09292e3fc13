"""What a level's answers say: rates, percentiles, errors by kind."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from latentkv.bench.load.client import Answer
from latentkv.bench.load.load import LevelRun


@dataclass(frozen=True)
class Percentiles:
    """Of a sample, in milliseconds; between two ranks the value is interpolated.

    Attributes:
        n: how many there were.
        mean: their mean.
        p50: the median. Likewise p90 and p99.
    """

    n: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ErrorCount:
    """How many requests failed in one way, and what the first of them was told."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True)
class Goodput:
    """Requests that kept every objective: a second, and as a share of those that ended, failed ones included."""

    requests_per_second: float
    share: float


@dataclass(frozen=True)
class RequestRow:
    """One request.

    Attributes:
        due_s: seconds after the level's start at which it should have been sent.
        late_ms: how much later it was sent: the client's own delay.
        ttft_ms: from due to the first chunk with text.
        longest_itl_ms: the longest gap between two chunks; None: fewer than two came.
        tpot_ms: from the first chunk to the last, over the tokens but one; None: fewer than two chunks came.
        e2e_ms: from due to the end, or to the failure.
        prompt_tokens: as the server counts; None: it did not say.
        output_tokens: likewise; chunks with text where it did not say.
        chunks: with text.
        error: kind of failure, None where the whole answer came.
    """

    due_s: float
    late_ms: float
    ttft_ms: float | None
    longest_itl_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    prompt_tokens: int | None
    output_tokens: int
    chunks: int
    error: str | None


@dataclass(frozen=True)
class LevelResult:
    """One level. Rates and percentiles are of the requests that were answered whole.

    Attributes:
        concurrency: of the load; None: see `rate`.
        rate: requests a second that were sent on average.
        seconds: from the start to the end of the last request.
        completed: requests answered whole.
        errors: the others, by kind, the most frequent first.
        unfinished: requests that an interruption cut off; they are neither.
        requests_per_second: completed ones.
        output_tokens_per_second: generated.
        total_tokens_per_second: generated and read; None: the server does not count prompts. Likewise:
        mean_prompt_tokens: of a request.
        cached_share: of the prompts' tokens, those that the server says it had cached; None: it does not say.
        mean_output_tokens: of a request.
        tokens_from_usage: whether tokens were counted by the server, not as chunks.
        ttft_ms: time to first token.
        itl_ms: gaps between chunks, of all requests together.
        tpot_ms: time per output token after the first.
        e2e_ms: whole requests.
        goodput: None where no objectives were given.
        client_share: of one core, what the client itself used; near 1 it is the client that was measured.
        latest_ms: the most that a request was sent late.
        requests: one by one.
    """

    concurrency: int | None
    rate: float | None
    seconds: float
    completed: int
    errors: list[ErrorCount]
    unfinished: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float | None
    mean_prompt_tokens: float | None
    cached_share: float | None
    mean_output_tokens: float | None
    tokens_from_usage: bool
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    e2e_ms: Percentiles | None
    goodput: Goodput | None
    client_share: float
    latest_ms: float
    requests: list[RequestRow]

    @property
    def failed(self) -> int:
        """Requests that were not answered whole."""
        return sum(error.count for error in self.errors)


def percentiles(sample: Sequence[float]) -> Percentiles | None:
    """Of a sample in milliseconds; None of an empty one."""
    if not sample:
        return None
    cuts = statistics.quantiles(sample, n=100, method="inclusive") if len(sample) > 1 else [sample[0]] * 99
    return Percentiles(len(sample), statistics.fmean(sample), cuts[49], cuts[89], cuts[98])


def summarise(run: LevelRun, slo: Mapping[str, float] | None = None) -> LevelResult:
    """The measures of a level.

    Args:
        run: what happened.
        slo: milliseconds that a request may take, by metric: ttft, itl (its longest gap), tpot, e2e.
    """
    whole = [answer for answer in run.answers if answer.failure is None]
    rows = [_row(answer, run.started) for answer in run.answers]
    whole_rows = [row for row in rows if row.error is None]
    seconds = max(run.seconds, 1e-9)
    output = sum(row.output_tokens for row in whole_rows)
    prompts = [row.prompt_tokens for row in whole_rows if row.prompt_tokens is not None]
    counted = bool(whole) and len(prompts) == len(whole)
    cached = [answer.cached_tokens for answer in whole if answer.cached_tokens is not None]
    good = sum(_keeps(row, slo) for row in whole_rows) if slo else 0
    return LevelResult(
        concurrency=run.level.concurrency,
        rate=run.level.rate,
        seconds=run.seconds,
        completed=len(whole),
        errors=_count_errors(run.answers),
        unfinished=run.sent - len(run.answers),
        requests_per_second=len(whole) / seconds,
        output_tokens_per_second=output / seconds,
        total_tokens_per_second=(output + sum(prompts)) / seconds if counted else None,
        mean_prompt_tokens=statistics.fmean(prompts) if counted else None,
        cached_share=sum(cached) / sum(prompts) if counted and cached and sum(prompts) else None,
        mean_output_tokens=output / len(whole) if whole else None,
        tokens_from_usage=all(answer.output_tokens is not None for answer in whole),
        ttft_ms=percentiles([row.ttft_ms for row in whole_rows if row.ttft_ms is not None]),
        itl_ms=percentiles([gap for answer in whole for gap in _gaps_ms(answer)]),
        tpot_ms=percentiles([row.tpot_ms for row in whole_rows if row.tpot_ms is not None]),
        e2e_ms=percentiles([row.e2e_ms for row in whole_rows]),
        goodput=Goodput(good / seconds, good / len(rows) if rows else 0.0) if slo else None,
        client_share=run.client_share,
        latest_ms=max((row.late_ms for row in rows), default=0.0),
        requests=rows,
    )


def _row(answer: Answer, started: float) -> RequestRow:
    chunks = answer.chunk_times
    tokens = len(chunks) if answer.output_tokens is None else answer.output_tokens
    spread_ms = (chunks[-1] - chunks[0]) * 1e3 if len(chunks) > 1 else None
    return RequestRow(
        due_s=answer.due - started,
        late_ms=(answer.sent - answer.due) * 1e3,
        ttft_ms=(chunks[0] - answer.due) * 1e3 if chunks else None,
        longest_itl_ms=max(_gaps_ms(answer), default=None),
        tpot_ms=spread_ms / (tokens - 1) if spread_ms is not None and tokens > 1 else None,
        e2e_ms=(answer.ended - answer.due) * 1e3,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=tokens,
        chunks=len(chunks),
        error=answer.failure.kind if answer.failure else None,
    )


def _gaps_ms(answer: Answer) -> list[float]:
    return [(later - earlier) * 1e3 for earlier, later in pairwise(answer.chunk_times)]


def _keeps(row: RequestRow, slo: Mapping[str, float]) -> bool:
    """Whether a request kept every objective; one of a single chunk has no gap that could be too long."""
    took = {"ttft": row.ttft_ms, "itl": row.longest_itl_ms, "tpot": row.tpot_ms, "e2e": row.e2e_ms}
    return all((took[metric] or 0.0) <= limit for metric, limit in slo.items())


def _count_errors(answers: Sequence[Answer]) -> list[ErrorCount]:
    failures = [answer.failure for answer in answers if answer.failure is not None]
    first = {failure.kind: failure.message for failure in reversed(failures)}
    return [ErrorCount(kind, count, first[kind]) for kind, count in Counter(f.kind for f in failures).most_common()]
