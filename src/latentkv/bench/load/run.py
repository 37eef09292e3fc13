"""Measuring a server under load, level by level."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from latentkv.bench.environment import cpu_name
from latentkv.bench.load.client import PATHS, Answer, Endpoint, ServeClient
from latentkv.bench.load.load import Level, LevelRun, Limit, require_positive, run_level
from latentkv.bench.load.measures import LevelResult, summarise
from latentkv.bench.load.preflight import Prepared, prepare, server_root
from latentkv.bench.load.workload import LoadRequest, Workload
from latentkv.errors import RequestError

_REQUESTS_AT_A_RATE, _LEAST_REQUESTS, _REQUESTS_PER_CLIENT = 64, 16, 4


@dataclass(frozen=True)
class ServeOptions:
    """How a server is measured.

    Attributes:
        url: its address, with or without /v1.
        levels: of load, in the order measured.
        api_key: None: none is sent.
        model: None: the only one that the server has.
        endpoint: completions or chat.
        requests: of each level; None: until `duration`, or where that is None too, 4 times the concurrency but at least
            16, and 64 at a rate.
        duration: seconds after which a level sends no more.
        warmup: requests before each level that are not counted.
        timeout: seconds that a request may take.
        ignore_eos: ask for exactly as many tokens as the workload says.
        extra_body: JSON fields of every request.
        characters_per_token: None: calibrated.
        slo: milliseconds by metric, for goodput; None: no goodput.
    """

    url: str
    levels: Sequence[Level]
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    endpoint: Endpoint = "completions"
    requests: int | None = None
    duration: float | None = None
    warmup: int = 1
    timeout: float = 600.0
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    characters_per_token: float | None = None
    slo: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise RequestError(f"{self.endpoint!r} is no endpoint; choose from {', '.join(PATHS)}.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise RequestError("The API key has characters that no HTTP header can carry; check it for a line break.")
        require_positive("--requests", self.requests)
        require_positive("--duration", self.duration)
        require_positive("--timeout", self.timeout)
        require_positive("--chars-per-token", self.characters_per_token)
        if self.warmup < 0:
            raise RequestError(f"--warmup must be at least 0, not {self.warmup}.")

    def limit(self, level: Level) -> Limit:
        """When `level` sends no more."""
        if self.requests is None and self.duration is None:
            if level.concurrency is None:
                return Limit(_REQUESTS_AT_A_RATE, None)
            return Limit(max(_LEAST_REQUESTS, _REQUESTS_PER_CLIENT * level.concurrency), None)
        return Limit(self.requests, self.duration)


@dataclass(frozen=True)
class ServeReport:
    """The measurement.

    Attributes:
        url: of the server.
        model: as the server calls it.
        endpoint: completions or chat.
        fields: of every request's JSON besides the model, the prompt and the tokens.
        workload: what was asked, in words, by name.
        characters_per_token: that prompts were cut by.
        warmup: requests before each level.
        client_cpu: name of the CPU of the machine that sent the load.
        client_load_before: programs that wanted to run there in the minute before.
        levels: results, in the order measured; an interrupted level is the last.
        notes: what the reader must know besides.
        interrupted: by Ctrl-C: levels or requests are missing.
    """

    url: str
    model: str
    endpoint: Endpoint
    fields: Mapping[str, Any]
    workload: Mapping[str, str | int]
    characters_per_token: float
    warmup: int
    client_cpu: str
    client_load_before: float
    levels: list[LevelResult]
    notes: list[str]
    interrupted: bool


@dataclass(frozen=True)
class LoadProgress:
    """How far a level is: requests ended and failed, and the share of it that is done, 0 to 1."""

    level: str
    ended: int
    failed: int
    share: float


def measure_serve(
    options: ServeOptions,
    workload: Workload,
    progress: Callable[[LoadProgress], None] = lambda _: None,
) -> ServeReport:
    """Put a server under every level of load, one after the other.

    Args:
        options: how.
        workload: what is asked.
        progress: called after every answer.

    Returns:
        The report; after Ctrl-C, of what had been measured by then.

    Raises:
        RequestError: the address is none.
        RemoteServerError: the server cannot be measured; see `prepare`.
        KeyboardInterrupt: Ctrl-C before anything was measured.
    """
    load_before = round(os.getloadavg()[0], 2)
    measured = asyncio.run(_measure(options, workload, progress))
    if measured.interrupted and not measured.runs:
        raise KeyboardInterrupt
    return ServeReport(
        url=server_root(options.url),
        model=measured.prepared.form.model,
        endpoint=options.endpoint,
        fields=measured.prepared.form.fields,
        workload=workload.facts(),
        characters_per_token=measured.prepared.ruler.characters_per_token,
        warmup=options.warmup,
        client_cpu=cpu_name(),
        client_load_before=load_before,
        levels=[summarise(run, options.slo) for run in measured.runs],
        notes=[*measured.prepared.notes, *measured.notes],
        interrupted=measured.interrupted,
    )


@dataclass
class _Measured:
    """What is there so far."""

    prepared: Prepared
    runs: list[LevelRun] = field(default_factory=list[LevelRun])
    notes: list[str] = field(default_factory=list[str])
    interrupted: bool = False


async def _measure(options: ServeOptions, workload: Workload, progress: Callable[[LoadProgress], None]) -> _Measured:
    async with ServeClient(server_root(options.url), api_key=options.api_key, timeout=options.timeout) as client:
        prepared = await prepare(
            client,
            workload,
            model=options.model,
            endpoint=options.endpoint,
            ignore_eos=options.ignore_eos,
            extra_body=options.extra_body,
            characters_per_token=options.characters_per_token,
        )
        measured = _Measured(prepared)

        async def ask(request: LoadRequest, due: float) -> Answer:
            return await client.ask(prepared.form, request, due)

        async def load(level: Level, limit: Limit, part: int, name: str) -> LevelRun:
            def watch(run: LevelRun) -> None:
                ended = len(run.answers)
                progress(LoadProgress(name, ended, run.failed, limit.share(ended, perf_counter() - run.started)))

            requests = workload.requests(prepared.ruler, part, 2 * len(options.levels))
            run = await run_level(ask, requests, level, limit, workload.seed, watch)
            measured.interrupted = run.interrupted
            return run

        for index, level in enumerate(options.levels):
            if options.warmup:
                clients = min(options.warmup, level.concurrency or options.warmup)
                warm_up = await load(Level(clients), Limit(options.warmup, None), 2 * index, f"{level.name}, warm-up")
                if warm_up.failed:
                    measured.notes.append(
                        f"{level.name}: {warm_up.failed} of {options.warmup} warm-up requests failed."
                    )
                if measured.interrupted:
                    break
            measured.runs.append(await load(level, options.limit(level), 2 * index + 1, level.name))
            if measured.interrupted:
                break
    return measured
