"""docs/reliability.md, lines 5, 13 and 17, and how a server's process ends: by signals, by force, by itself."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from forked_program import MAIN, run_forked
from latentkv.llm_options import EMBEDDED_MODEL
from server_process import COMMAND, ServerProcess, server_process

SMALL = ("--kv-cache-bytes", "16MiB")


def run(*arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of `latentkv serve`."""
    code, _, said = run_forked(MAIN, "serve", "--port", "0", *arguments)
    return code, said


def ask_in_background(server: ServerProcess, *bodies: dict) -> list[threading.Thread]:
    threads = []
    for body in bodies:

        def ask(body: dict = body) -> None:
            asked = {name: value for name, value in body.items() if name != "answer"}
            with suppress(OSError, HTTPException):  # a server that is killed answers nothing
                body["answer"] = server.ask("POST", "/v1/completions", asked)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
    return threads


def wait_until_running(server: ServerProcess, count: int) -> None:
    while server.ask("GET", "/stats")[1]["requests"]["running"] < count:
        time.sleep(0.01)


def test_a_signal_under_load_lets_requests_end_and_exits_0() -> None:
    with server_process(*SMALL, "--drain-seconds", "120", command=COMMAND) as server:
        (thread,) = ask_in_background(server, body := {"prompt": "x", "max_tokens": 300, "ignore_eos": True})
        wait_until_running(server, 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.process.wait(timeout=60) == 0
    assert body["answer"][0] == 200 and body["answer"][1]["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_tells_requests_that_do_not_end_in_time_and_exits_0(sign: signal.Signals) -> None:
    long = {"prompt": "x", "max_tokens": 3800, "ignore_eos": True}
    streamed = {**long, "stream": True}
    with server_process(*SMALL, "--drain-seconds", "0") as server:
        threads = ask_in_background(server, long, streamed)
        wait_until_running(server, 2)
        server.process.send_signal(sign)
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=60) == 0
    assert long["answer"][0] == 503 and "shutting down" in long["answer"][1]["error"]["message"]
    assert "shutting down" in streamed["answer"][1] and streamed["answer"][1].endswith("data: [DONE]\n\n")
    assert "Traceback" not in "".join(server.lines)


def test_a_second_signal_waits_no_longer() -> None:
    with server_process(*SMALL, "--drain-seconds", "600") as server:
        (thread,) = ask_in_background(server, body := {"prompt": "x", "max_tokens": 3800, "ignore_eos": True})
        wait_until_running(server, 1)
        server.process.send_signal(signal.SIGTERM)
        with suppress(OSError):
            while True:  # until nobody is let in any more: the first signal was heard
                socket.create_connection(("127.0.0.1", server.port), timeout=10).close()
                time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        thread.join()
    assert body["answer"][0] == 503


def test_after_kill_9_a_new_server_takes_the_same_port() -> None:
    with server_process(*SMALL) as first:
        ask_in_background(first, {"prompt": "x", "max_tokens": 3800, "stream": True})
        wait_until_running(first, 1)
        first.process.kill()
        first.process.wait()
        with server_process(*SMALL, "--port", str(first.port)) as second:
            assert second.port == first.port
            assert second.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_a_second_server_on_a_port_is_told_at_once_before_any_model_is_read() -> None:
    with server_process(*SMALL) as first:
        code, said = run(*SMALL, "--port", str(first.port), "no/such-model")
        assert code == 2
        assert f"Port {first.port}" in said and "--port" in said
        assert len(said.splitlines()) == 1
        assert first.ask("GET", "/health")[0] == 200


def test_line_13_a_truncated_model_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, said = run(str(tmp_path / "model"))
    assert code == 2
    loading, error = said.splitlines()
    assert loading.startswith("Loading model ") and error.startswith("error: ")
    assert "model.safetensors" in error


def test_line_17_only_this_machine_is_let_in_unless_there_is_a_key_or_it_is_said() -> None:
    code, said = run("--host", "0.0.0.0", "no/such-model")
    assert code == 2
    assert "--api-key-file" in said and "--allow-anyone" in said


BROKEN = """
import sys, threading
import latentkv.engine.runner as runner
from latentkv.cli.app import main
def broken(*_): raise RuntimeError("broken")
runner.Runner.submit = broken
main()
"""


def test_line_05_a_dead_engine_ends_the_process_with_exit_code_1() -> None:
    with server_process(*SMALL, code=BROKEN) as server:
        statuses = []
        for _ in range(4):
            try:
                statuses.append(server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0])
            except OSError:
                break
        assert statuses[:2] == [500, 500]
        assert server.process.wait(timeout=60) == 1
        assert "the engine died" in "".join(server.lines)


def test_the_log_is_json_even_of_what_is_no_http() -> None:
    with server_process(*SMALL) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"\x16\x03\x01 is how TLS begins\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert server.ask("GET", "/health")[0] == 200
        while not (found := [line for line in server.lines if "Invalid HTTP request" in line]):
            time.sleep(0.01)
    assert json.loads(found[0])["level"] == "warning"
