"""A command that starts its own ranks: what it prints, how it ends, and that nobody else can reach them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine_models import MLA
from latentkv import LLM, SamplingParams
from server_process import server_process
from stored_models import write_model

COMMAND = [sys.executable, "-m", "latentkv"]
PROMPT = "7 11 30 5 9"
RANKS = ("--pipeline-parallel", "2", "--rank-timeout", "20", "--dtype", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", {**MLA, "num_hidden_layers": 4})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def greedy(folder: Path) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    return LLM(folder, dtype="fp32").generate([int(word) for word in PROMPT.split()], params)[0].token_ids


def test_generate_prints_what_one_process_does(folder: Path):
    done = run("generate", *PROMPT.split(), "--token-ids", "-m", folder, "-n", 12, "--temperature", 0, *RANKS)
    assert done.returncode == 0, done.stderr
    shown = [int(word) for word in done.stdout.split()]
    assert shown == greedy(folder)[: len(shown)] and len(shown) > 1  # an end token ends it
    assert "Rank 1 of 2: layers" in done.stderr and "in this rank of 2, layers" in done.stderr


@pytest.mark.rank
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--temperature", "-1"), "temperature"),
        (("-m", "nowhere"), "nowhere"),
        (("--cache-dir", "kept"), "cache_dir cannot be had with pipeline_parallel"),
        (("--pipeline-parallel", "5"), "4 stages at most, not 5"),
    ],
)
def test_what_cannot_be_is_refused_at_once_by_every_rank(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
):
    began = time.monotonic()
    given = (str(tmp_path / "kept") if argument == "kept" else argument for argument in arguments)
    done = run("generate", "7", "--token-ids", "-m", folder, *RANKS, *given)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - began < 25  # nobody waits until it is killed


@pytest.mark.rank
def test_serve_listens_on_the_loopback_interface_alone_and_ends_well(folder: Path):
    with server_process(str(folder), *RANKS, command=[*COMMAND, "serve", "--port", "0"]) as server:
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        assert len(processes) >= 3
        listening = [
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening and set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        body = {"model": "m", "prompt": [7, 11], "max_tokens": 4}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        assert not [process for process in processes if process.is_running() and process.status() != "zombie"]


@pytest.mark.rank
def test_serve_ends_with_1_and_names_a_rank_that_was_killed(folder: Path):
    with server_process(str(folder), *RANKS, command=[*COMMAND, "serve", "--port", "0"]) as server:
        children = psutil.Process(server.process.pid).children()
        (victim,) = (child for child in children if child.environ().get("RANK") == "1")
        victim.kill()
        assert server.process.wait(40) == 1
        assert not any(child.is_running() and child.status() != "zombie" for child in children)
        time.sleep(0.2)
        assert "Rank 1" in "".join(server.lines)
