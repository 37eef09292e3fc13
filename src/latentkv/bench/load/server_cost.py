"""What serving costs: the tokens a second of `latentkv serve` beside those of `LLM.generate`, in turn."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from latentkv.bench.environment import Environment, describe_environment
from latentkv.bench.timing import Contender, Timing, time_interleaved
from latentkv.engine import SamplingParams
from latentkv.errors import ConfigError, RequestError
from latentkv.llm import LLM
from latentkv.options import LLMOptions

_PROGRAM = "from latentkv.cli.app import main; main()"
_WARMUP = 2
_START_SECONDS = 600
_STOP_SECONDS = 20
_ANSWER_SECONDS = 600
_PROMPT = "It was a dark night, and the old man sat by the fire and told his story to the children."


@dataclass(frozen=True)
class ServerCostRow:
    """One number of requests at once.

    Attributes:
        concurrency: requests at once.
        generate: tokens a second of `LLM.generate`, all requests together; the median.
        served: those of the server, streamed over HTTP to a client on this machine; the median.
        generate_spread: interquartile range over the median.
        served_spread: likewise.
        loop_ms: milliseconds of a core that the server's event loop takes for a token, requests included; None where
            the system does not tell.
    """

    concurrency: int
    generate: float
    served: float
    generate_spread: float
    served_spread: float
    loop_ms: float | None

    @property
    def share(self) -> float:
        """What is left of the speed."""
        return self.served / self.generate


@dataclass(frozen=True)
class ServerCostReport:
    """All rows, and how they were taken.

    Attributes:
        model: its name.
        new_tokens: of every completion, greedy.
        rounds: timed ones, both in turn.
        rows: one a concurrency.
        environment: where.
    """

    model: str
    new_tokens: int
    rounds: int
    rows: tuple[ServerCostRow, ...]
    environment: Environment


def measure_server_cost(
    options: LLMOptions,
    *,
    arguments: Sequence[str] = (),
    concurrency: Sequence[int] = (1, 8),
    new_tokens: int = 128,
    rounds: int = 14,
    progress: Callable[[str], object] = lambda text: None,
) -> ServerCostReport:
    """Time `LLM.generate` in this process and `latentkv serve` in another, in turn; while one runs the other waits.

    Args:
        options: of the model.
        arguments: of `latentkv serve`, which say the same.
        concurrency: requests at once, a row each.
        new_tokens: of every completion.
        rounds: timed rounds a row.
        progress: told what is being done.

    Raises:
        RequestError: a number is out of range.
        ConfigError: the server does not start.
    """
    if new_tokens < 1 or rounds < 1 or not concurrency or min(concurrency) < 1:
        raise RequestError("concurrency, new tokens and rounds must be at least 1.")
    environment = describe_environment(torch.get_num_threads())
    progress("loading the model")
    llm = LLM(**vars(options))
    progress("starting the server")
    with _server(arguments) as (address, process), ThreadPoolExecutor(max(concurrency)) as clients:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        rows: list[ServerCostRow] = []
        for many in concurrency:
            progress(f"{many} at once, {rounds} rounds")
            prompts = [f"{number}. {_PROMPT}" for number in range(many)]

            def ask(prompts: list[str] = prompts) -> None:
                for tokens in clients.map(partial(_ask, address, new_tokens), prompts):
                    if tokens != new_tokens:
                        raise ConfigError(f"The server made {tokens} tokens of {new_tokens}.")

            def generate(prompts: list[str] = prompts) -> None:
                llm.generate(prompts, params)

            before = _loop_seconds(process)
            timings = time_interleaved(
                {"generate": Contender(generate), "served": Contender(ask)}, repeats=rounds, warmup=_WARMUP
            )
            after = _loop_seconds(process)
            tokens = many * new_tokens
            loop = None if before is None or after is None else (after - before) / (tokens * (rounds + _WARMUP))
            rows.append(_row(many, tokens, timings["generate"], timings["served"], loop))
    return ServerCostReport(str(options.model or "the embedded model"), new_tokens, rounds, tuple(rows), environment)


def _row(concurrency: int, tokens: int, generate: Timing, served: Timing, loop: float | None) -> ServerCostRow:
    return ServerCostRow(
        concurrency,
        tokens / generate.median,
        tokens / served.median,
        generate.spread,
        served.spread,
        None if loop is None else 1e3 * loop,
    )


def _loop_seconds(process: int) -> float | None:
    """Processor time so far of a process' first thread, in which the event loop runs."""
    try:
        stat = Path(f"/proc/{process}/task/{process}/stat").read_text()
    except OSError:  # not Linux
        return None
    fields = stat.rpartition(")")[2].split()  # from the third on: the second is a name, which may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ask(address: str, new_tokens: int, prompt: str) -> int:
    """Stream one completion to its end; how many tokens it had.

    The client shares the server's cores, so it is one that does next to nothing: it reads, and looks at the end alone.
    """
    body = {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address, timeout=_ANSWER_SECONDS)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        parts: list[bytes] = []
        while part := response.read1():
            parts.append(part)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"The server failed: {error!r}") from None
    finally:
        connection.close()
    said = b"".join(parts).decode()
    if response.status != 200 or not (found := re.search(r'"completion_tokens": ?(\d+)', said)):
        raise ConfigError(f"The server failed: {said[-300:]}")
    return int(found[1])


@contextmanager
def _server(arguments: Sequence[str]) -> Generator[tuple[str, int]]:
    """The host and port of `latentkv serve`, and the id of its process, which ends with the block."""
    command = [sys.executable, "-c", _PROGRAM, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        for line in process.stderr or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield _address(lines), process.pid
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(lines: SimpleQueue[str | None]) -> str:
    """Where a server says that it listens."""
    said: list[str] = []
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0))
        except Empty:
            raise ConfigError(f"The server did not start within {_START_SECONDS} s.") from None
        if line is None:
            raise ConfigError(f"The server did not start: {' '.join(said).strip()}")
        said.append(line)
        if found := re.search(r"on http://(\S+?:\d+)", "".join(said)):
            return found[1]
