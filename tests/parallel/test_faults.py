"""A rank that dies, hangs, comes late or is another one than the rest: all end in time, and say which it was."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine_models import MLA
from forked_program import ForkedProgram
from rank_programs import BEGIN, free_port, ranks_of
from stored_models import write_model

TIMEOUT = 3.0
"""Seconds without a word of a rank."""

AT_MOST = TIMEOUT + 5
"""Seconds until all have ended, from any fault on."""

SERVE = (
    BEGIN
    + """
sys.argv = ["latentkv", "serve", task["folder"], "--port", "0", "--pipeline-parallel", size, *task["options"]]
from latentkv.cli.app import main
main()
"""
)
OPTIONS = ("--rank-timeout", str(TIMEOUT), "--dtype", "fp32", "--kv-cache-bytes", "4MiB", "--drain-seconds", "2")

NOBODY_HANGS = ("--rank-timeout", "60")
"""For tests in which no rank is silent: a busy machine may take longer than `TIMEOUT` to start one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**MLA, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    return write_model(tmp_path_factory.mktemp("model") / "m", config)


@dataclass
class Cluster:
    """Ranks that serve, and what they have written so far."""

    ranks: list[ForkedProgram]
    lines: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rank in self.ranks:
            own: list[str] = []
            self.lines.append(own)
            threading.Thread(target=lambda rank=rank, own=own: own.extend(rank.stderr), daemon=True).start()

    def wait_for_port(self) -> int:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"on http://\S+?:(\d+)", "".join(self.lines[0]))):
            assert self.ranks[0].poll() is None and time.monotonic() < deadline, self.lines
            time.sleep(0.02)
        return int(found[1])

    def wait_for_end(self, but: int | None = None) -> float:
        """Seconds until all have ended, `but` one that a launcher would have to kill."""
        began = time.monotonic()
        while any(rank.poll() is None for number, rank in enumerate(self.ranks) if number != but):
            assert time.monotonic() - began < 60, (self.codes, self.lines)
            time.sleep(0.02)
        return time.monotonic() - began

    @property
    def codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def said(self, rank: int) -> str:
        time.sleep(0.1)  # for what is on its way through the pipe
        return "".join(self.lines[rank])


@contextmanager
def cluster(size: int, folder: Path, *options: str) -> Generator[Cluster]:
    task = json.dumps({"folder": str(folder), "options": [*OPTIONS, *options]})
    with ranks_of(SERVE, size, task) as ranks:
        try:
            yield Cluster(ranks)
        finally:
            for rank in ranks:
                rank.send_signal(signal.SIGCONT)


def ask(port: int, method: str, path: str, body: Any = None, timeout: float = 30) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        headers = {"content-type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


class Stream(threading.Thread):
    """Somebody who has a long answer streamed; `events` has come, and `ended` tells that the connection is closed."""

    def __init__(self, port: int, prompt: int, tokens: int) -> None:
        super().__init__(daemon=True)
        self.body = {
            "model": "m",
            "prompt": [3 + i % 50 for i in range(prompt)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        self.port, self.events, self.ended = port, "", threading.Event()
        self.start()

    def run(self) -> None:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(self.body), {"content-type": "application/json"})
            answer = connection.getresponse()
            while piece := answer.read1():
                self.events += piece.decode(errors="replace")
        self.ended.set()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.events:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)


def test_a_killed_rank_ends_all_and_its_streams_with_an_error_that_names_it(folder: Path):
    with cluster(3, folder) as ranks:
        port = ranks.wait_for_port()
        stream = Stream(port, 10, 4000)
        stream.wait_for("text")
        ranks.ranks[2].kill()
        assert ranks.wait_for_end() < AT_MOST
        assert stream.ended.wait(5)
        assert ranks.codes == [1, 1, -9]
    assert '"error"' in stream.events and "Rank 2 is gone" in stream.events
    assert "Rank 2 is gone" in ranks.said(0)


@pytest.mark.rank
def test_a_rank_that_hangs_is_late_and_then_dead_in_health(folder: Path):
    with cluster(2, folder, "--rank-timeout", "8") as ranks:
        port = ranks.wait_for_port()
        assert ask(port, "GET", "/health")[0] == 200
        ranks.ranks[1].send_signal(signal.SIGSTOP)
        began, said = time.monotonic(), []
        with suppress(OSError):
            while ranks.ranks[0].poll() is None:
                said.append((time.monotonic() - began, *ask(port, "GET", "/health", timeout=3)))
                time.sleep(0.1)
        assert ranks.wait_for_end() < 5
        assert time.monotonic() - began < 8 + 5
    late = [text for seconds, status, text in said if status == 503]
    assert late and "Rank 1 has not been heard of for" in late[0]
    assert all(status == 503 for seconds, status, _ in said if seconds > 7)
    assert ranks.codes == [1, -9]
    assert "Rank 1 did not answer for 8 seconds" in ranks.said(0) + late[-1]


@pytest.mark.rank
def test_the_other_ranks_end_when_the_driver_is_killed(folder: Path):
    with cluster(3, folder) as ranks:
        ranks.wait_for_port()
        ranks.ranks[0].kill()
        assert ranks.wait_for_end() < AT_MOST
        assert ranks.codes[0] == -9 and set(ranks.codes[1:]) <= {1, -9}
    assert "Rank 0" in ranks.said(1)


@pytest.mark.rank
def test_a_driver_that_hangs_is_given_up_by_the_others(folder: Path):
    with cluster(2, folder) as ranks:
        ranks.wait_for_port()
        ranks.ranks[0].send_signal(signal.SIGSTOP)
        assert ranks.wait_for_end() < AT_MOST
        assert ranks.codes == [-9, 1]
    assert "Rank 0 did not answer for 3 seconds" in ranks.said(1)


def test_a_signal_lets_open_answers_end_and_then_all_ranks(folder: Path):
    with cluster(2, folder, *NOBODY_HANGS, "--drain-seconds", "20") as ranks:
        port = ranks.wait_for_port()
        stream = Stream(port, 10, 60)
        stream.wait_for("text")
        for rank in ranks.ranks:
            rank.send_signal(signal.SIGTERM)
        assert ranks.wait_for_end() < 30
        assert stream.ended.wait(5)
        assert ranks.codes == [0, 0]
    assert "[DONE]" in stream.events and '"error"' not in stream.events


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (["--dtype", "bf16"], r"Rank 1 \(.*\) has dtype bfloat16, and rank 0 \(.*\) float32"),
        pytest.param(
            ["--max-context", "512"],
            r"Rank 1 \(.*\) has max_context 512, and rank 0 \(.*\) 4096",
            marks=pytest.mark.rank,
        ),
        pytest.param(
            ["another"], r"Rank 1 \(.*\) has a model of the digest \w+, and rank 0 \(.*\) \w+", marks=pytest.mark.rank
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_rank_that_was_started_otherwise_is_named(folder: Path, tmp_path: Path, theirs: list[str], expected: str):
    other = folder
    if theirs == ["another"]:
        other, theirs = (
            write_model(tmp_path / "m", {**MLA, "num_hidden_layers": 5, "max_position_embeddings": 4096}),
            [],
        )
    tasks = [
        json.dumps({"folder": str(where), "options": [*OPTIONS, *options]})
        for where, options in ((folder, []), (other, theirs))
    ]
    port = free_port()
    ranks = Cluster([ForkedProgram(SERVE, rank, 2, port, task) for rank, task in enumerate(tasks)])
    assert ranks.wait_for_end() < 30
    assert ranks.codes == [2, 2]
    assert re.search(expected, ranks.said(0)) and re.search(expected, ranks.said(1))


@pytest.mark.rank
def test_a_rank_that_does_not_come_is_missed(folder: Path):
    task = json.dumps({"folder": str(folder), "options": OPTIONS})
    alone = Cluster([ForkedProgram(SERVE, 0, 2, free_port(), task)])
    assert alone.wait_for_end() < 30
    assert alone.codes == [2]
    assert "Not all of 2 ranks have come within 3 seconds" in alone.said(0)


@pytest.mark.rank
def test_a_rank_that_cannot_load_its_part_is_heard_by_the_others(folder: Path, tmp_path: Path):
    task = json.dumps({"folder": str(tmp_path / "nowhere"), "options": OPTIONS})
    with ranks_of(SERVE, 2, task) as programs:
        ranks = Cluster(programs)
        assert ranks.wait_for_end() < 30
        assert set(ranks.codes) <= {1, 2}
    assert "nowhere" in ranks.said(0)


@pytest.mark.rank
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("how", ["stages", "shards"])
def test_no_fault_at_any_moment_leaves_anything_behind(folder: Path, seed: int, how: str):
    chance = random.Random(seed)
    size = chance.choice([2, 3])
    victim = chance.randrange(size)
    moment = chance.choice(["load", "prefill", "decode", "idle", "shutdown"])
    sign = chance.choice([signal.SIGKILL, signal.SIGSTOP])
    shared = ["--pipeline-parallel", "1", "--tensor-parallel", str(size)] if how == "shards" else []
    with cluster(size, folder, *shared) as ranks:
        streams: list[Stream] = []
        if moment == "load":
            time.sleep(chance.uniform(0, 2))
        else:
            port = ranks.wait_for_port()
            if moment in ("prefill", "decode"):
                lengths = (3000, 20) if moment == "prefill" else (10, 4000)
                streams = [Stream(port, *lengths) for _ in range(chance.randint(1, 4))]
                if moment == "decode":
                    streams[0].wait_for("text")
            time.sleep(chance.uniform(0, 0.3))
            if moment == "shutdown":
                ranks.ranks[0].send_signal(signal.SIGTERM)
                time.sleep(chance.uniform(0, 0.3))
        ranks.ranks[victim].send_signal(sign)
        # Who is stopped before all know each other, or when the others have been let go, is its launcher's to kill.
        alone = sign == signal.SIGSTOP and moment in ("load", "shutdown")
        assert ranks.wait_for_end(victim if alone else None) < AT_MOST
        assert all(stream.ended.wait(5) for stream in streams)
        if moment != "shutdown":
            codes = [code for rank, code in enumerate(ranks.codes) if rank != victim]
            assert all(code not in (0, None) for code in codes), (ranks.codes, ranks.lines)
