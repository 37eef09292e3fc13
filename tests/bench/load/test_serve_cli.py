"""`latentkv bench serve` as people run it, against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from serve_server import FakeServer, running
from typer.testing import Result

from command_line import run_here


@pytest.fixture
def server():
    with running() as fake:
        yield fake


@pytest.fixture(scope="module")
def unasked():
    """One for tests that ask nothing of it."""
    with running() as fake:
        yield fake


def bench(url: str, *options: object) -> Result:
    lengths = ["--prompt-tokens", 50, "--output-tokens", 4]
    return run_here("bench", "serve", url, *lengths, *options)


def cells(output: str, first: str) -> list[str]:
    """The cells of the first row of a table that begins with `first`."""
    row = next(line for line in output.splitlines() if re.match(rf"│\s+{re.escape(first)} │", line))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_a_row_for_each_level_and_every_number_in_files(server: FakeServer, tmp_path: Path):
    server.first_delay, server.gap = 0.05, 0.01
    json_file, plot = tmp_path / "s.json", tmp_path / "s.png"
    result = bench(server.url, "--concurrency", "1,3", "--requests", 6, "--json", json_file, "--plot", plot)
    assert result.exit_code == 0, result.output
    for concurrency in ("1", "3"):
        assert cells(result.stdout, concurrency)[1:3] == ["6", "0"]
        assert cells(result.stdout, concurrency)[6:8] == ["50.0", "4.0"]
    report = json.loads(json_file.read_text())
    assert report["model"] == "tiny"
    assert report["workload"] == {
        "prompt tokens": "50",
        "output tokens": "4",
        "shared prefix": 0,
        "text": "common words",
        "seed": 0,
    }
    assert [level["concurrency"] for level in report["levels"]] == [1, 3]
    for level in report["levels"]:
        assert level["completed"] == len(level["requests"]) == 6
        assert level["errors"] == []
        assert level["ttft_ms"]["p50"] >= 50
        assert level["itl_ms"]["n"] == 6 * 3
        assert level["itl_ms"]["mean"] >= 9
        assert level["tpot_ms"]["mean"] == pytest.approx(level["itl_ms"]["mean"])
        assert level["e2e_ms"]["p50"] >= 80
        assert level["output_tokens_per_second"] == pytest.approx(24 / level["seconds"])
        assert level["total_tokens_per_second"] == pytest.approx((24 + 300) / level["seconds"])
        # Never faster than the delays of the server allow, one request after another for each client.
        assert level["seconds"] >= 0.08 * 6 / level["concurrency"]
    assert server.most_under_way == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_asks_the_same_of_every_server(server: FakeServer):
    options = ["--concurrency", 1, "--requests", 5, "--prompt-tokens", "lognormal:60,20", "--shared-prefix", 20]
    bench(server.url, *options)
    with running() as other:
        bench(other.url, *options)
        bodies = other.bodies
    assert server.bodies == bodies
    assert len({body["prompt"] for body in server.counted}) == 6  # the warm-up's as well
    assert len({body["prompt"][:80] for body in server.counted}) == 1


def test_warm_up_requests_are_sent_and_not_counted(server: FakeServer):
    result = bench(server.url, "--concurrency", 2, "--requests", 3, "--warmup", 4)
    assert cells(result.stdout, "2")[1] == "3"
    assert len(server.counted) == 7


def test_a_rate_is_a_level_too(server: FakeServer, tmp_path: Path):
    result = bench(server.url, "--rate", "50,100", "--requests", 5, "--json", tmp_path / "s.json", "--endpoint", "chat")
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "100/s")[1] == "5"
    assert [level["rate"] for level in json.loads((tmp_path / "s.json").read_text())["levels"]] == [50, 100]
    assert "messages" in server.bodies[0]


def test_errors_are_counted_by_kind_with_an_example_and_the_rest_is_measured(server: FakeServer):
    server.failures = {0: 429, 2: 429, 3: "cut", 5: 500}
    result = bench(server.url, "--concurrency", 1, "--requests", 8, "--warmup", 0)
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "1")[1:3] == ["4", "4"]
    assert "2 x HTTP 429 (refused with 429)" in result.stdout
    assert "1 x HTTP 500 (refused with 500)" in result.stdout
    assert "1 x disconnect" in result.stdout


def test_the_exit_code_is_one_if_every_request_failed(server: FakeServer, tmp_path: Path):
    server.failures = dict.fromkeys(range(100), 503)
    result = bench(server.url, "--concurrency", 2, "--requests", 3, "--json", tmp_path / "s.json")
    assert result.exit_code == 1
    assert "3 x HTTP 503" in result.stdout
    assert "1 of 1 warm-up requests failed" in result.stdout
    assert json.loads((tmp_path / "s.json").read_text())["levels"][0]["completed"] == 0


def test_a_server_without_usage_is_measured_in_chunks_and_that_is_said(server: FakeServer):
    server.usage = False
    result = bench(server.url, "--concurrency", 1, "--requests", 2, "--chars-per-token", 4)
    assert result.exit_code == 0, result.output
    assert "tokens are counted as chunks" in result.stdout
    assert cells(result.stdout, "1")[5:8] == ["?", "?", "4.0"]


def test_a_slow_first_token_shows_in_ttft_and_not_in_itl(server: FakeServer, tmp_path: Path):
    server.first_delay = 0.3
    bench(server.url, "--concurrency", 2, "--requests", 4, "--json", tmp_path / "s.json")
    level = json.loads((tmp_path / "s.json").read_text())["levels"][0]
    assert level["ttft_ms"]["p50"] >= 300
    assert level["itl_ms"]["p99"] < 300


def test_goodput_is_a_column_where_objectives_are_given(server: FakeServer):
    server.first_delay = 0.1
    kept = bench(server.url, "--concurrency", 2, "--requests", 4, "--slo", "ttft=60s,e2e=60s")
    assert cells(kept.stdout, "2")[-1] == "100%"
    broken = bench(server.url, "--concurrency", 2, "--requests", 4, "--slo", "ttft=99ms")
    assert cells(broken.stdout, "2")[-2:] == ["0.00", "0%"]
    assert "good" not in bench(server.url, "--concurrency", 2, "--requests", 4).stdout


def test_text_of_ones_own(server: FakeServer, tmp_path: Path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 200)
    bench(server.url, "--concurrency", 1, "--requests", 2, "--text", tmp_path / "a.txt")
    assert all(set(body["prompt"]) <= set("abcdefgh") for body in server.bodies)


def test_ctrl_c_gives_what_was_measured_so_far(server: FakeServer, tmp_path: Path):
    server.first_delay = 0.1

    def interrupt() -> None:
        while len(server.counted) < 5:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = bench(server.url, "--concurrency", "2,4", "--requests", 1000, "--json", tmp_path / "s.json")
    assert result.exit_code == 130, result.output
    assert "Interrupted: this is what was measured until then" in result.stdout
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["interrupted"]
    assert len(report["levels"]) == 1
    assert 1 <= report["levels"][0]["completed"] < 1000
    assert report["levels"][0]["unfinished"] >= 1


def test_ctrl_c_before_anything_was_measured_ends_it_quietly(server: FakeServer):
    server.always = "hang"

    def interrupt() -> None:
        while not server.bodies:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = bench(server.url)
    assert result.exit_code == 130
    assert result.stdout == ""


def test_the_key_is_sent_and_written_nowhere(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.key = "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    result = bench(server.url, "--concurrency", 1, "--requests", 1, "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert "sk-secret" not in result.output + (tmp_path / "s.json").read_text()
    wrong = bench(server.url, "--api-key", "sk-wrong")
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: ") and "API key" in wrong.stderr


def test_a_server_that_is_not_there_is_one_sentence(unused_url: str):
    result = bench(unused_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: No server can be reached at {unused_url}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "many"], "many"),
        (["--rate", "fast"], "fast"),
        (["--rate", "-1"], "--rate"),
        (["--rate", "1", "--concurrency", "1"], "--concurrency"),
        (["--rate", "1", "--burstiness", "0"], "--burstiness"),
        (["--requests", "0"], "--requests"),
        (["--duration", "0"], "--duration"),
        (["--timeout", "nan"], "--timeout"),
        (["--warmup", "-1"], "--warmup"),
        (["--shared-prefix", "-1"], "--shared-prefix"),
        (["--chars-per-token", "0"], "--chars-per-token"),
        (["--prompt-tokens", "9-3"], "9-3"),
        (["--output-tokens", "some"], "some"),
        (["--endpoint", "embeddings"], "embeddings"),
        (["--api-key", "sk-\n"], "API key"),
        (["--body", "[]"], "--body"),
        (["--body", "{"], "--body"),
        (["--slo", "mood=1s"], "mood"),
        (["--text", "/no/such/file.txt"], "file.txt"),
        (["--json", "/no/such/folder/s.json"], "/no/such/folder"),
        (["--plot", "/no/such/folder/s.png"], "/no/such/folder"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_is_sent(unasked: FakeServer, options: list[str], named: str):
    result = bench(unasked.url, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and named in result.stderr
    assert unasked.bodies == []
