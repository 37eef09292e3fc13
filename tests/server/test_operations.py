"""What is not generation: tokens, health, metrics, stats, ids, logs, other origins."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import urllib.error
import urllib.request

import openai
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from latentkv import LLM, SamplingParams
from latentkv.plan import mha_bytes
from latentkv.server.logs import JsonFormatter, logger
from latentkv.server.metrics import SECONDS, Metrics, RequestClock
from latentkv.server.run import bind
from live_server import NAME, Live, ask, serving

PROMPT = "It was a dark night"


def metrics(live: Live) -> dict[str, float]:
    """Value by series."""
    lines = [line for line in ask(live, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_tokens_are_those_of_a_completion_and_come_back_as_the_text(live: Live, reference: LLM) -> None:
    status, answer, _ = ask(live, "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    ids = list(reference.request(PROMPT).prompt_token_ids)
    assert (status, answer["tokens"], answer["count"]) == (200, ids, len(ids))
    assert answer["max_model_len"] == reference.max_context
    assert len(answer["token_strs"]) == len(ids)
    bare = ask(live, "/tokenize", {"prompt": PROMPT, "add_special_tokens": False})[1]["tokens"]
    assert ask(live, "/detokenize", {"tokens": bare})[1] == {"prompt": PROMPT}
    chat = ask(live, "/tokenize", {"messages": [{"role": "user", "content": PROMPT}]})[1]["tokens"]
    assert chat == reference.chat_tokens(reference.chat_text([{"role": "user", "content": PROMPT}]))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 30]}),
        ("/tokenize", {"prompt": "x", "model": "other"}),
    ],
)
def test_tokens_that_cannot_be_are_refused(live: Live, path: str, body: dict) -> None:
    status, answer, _ = ask(live, path, body)
    assert status in (400, 404) and answer["error"]["message"]


def test_a_model_of_several_names_answers_to_each_and_says_the_first(reference: LLM) -> None:
    with serving(LLM(reference.folder, kv_cache_bytes=1 << 20), other_names=("tiny", NAME, "gpt-4o")) as own:
        listed = ask(own, "/v1/models")[1]["data"]
        assert [card["id"] for card in listed] == [NAME, "tiny", "gpt-4o"]
        assert ask(own, "/v1/models/tiny")[1]["id"] == "tiny"
        for name in (NAME, "tiny", "gpt-4o"):
            status, answer, _ = ask(own, "/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1})
            assert (status, answer["model"]) == (200, NAME)
        assert ask(own, "/v1/models/other")[0] == 404


def test_metrics_count_what_was_asked_and_what_was_given_up(client: openai.OpenAI, live: Live) -> None:
    label = f'{{model_name="{NAME}"}}'
    reason = 'latentkv:request_success_total{{finished_reason="{}",model_name="' + NAME + '"}}'
    before = metrics(live)
    got = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=7, n=2, extra_body={"ignore_eos": True})
    with client.completions.create(model=NAME, prompt=PROMPT, max_tokens=2000, stream=True) as stream:
        next(iter(stream))  # leaves in the middle
    live.wait_until_free()
    after = metrics(live)

    def grown(series: str) -> float:
        return after.get(series, 0) - before.get(series, 0)

    assert got.usage is not None
    assert grown(f"latentkv:prompt_tokens_total{label}") == 3 * got.usage.prompt_tokens  # each completion's
    assert grown(f"latentkv:generation_tokens_total{label}") >= 14
    assert grown(reason.format("length")) == 2
    assert grown(f"latentkv:request_generation_tokens_count{label}") == 2
    assert grown(f"latentkv:time_to_first_token_seconds_count{label}") in (2, 3)
    assert after[f"latentkv:num_requests_running{label}"] == 0
    assert after[f"latentkv:kv_cache_usage_perc{label}"] == 0


def test_stats_compare_the_cache_with_multi_head_attention(live: Live) -> None:
    status, stats, _ = ask(live, "/stats")
    assert status == 200
    cache, own = stats["cache"], live.llm.cache
    assert (stats["model"], cache["format"], cache["used_tokens"]) == (NAME, own.format, 0)
    assert stats["chat_template"] is False
    assert cache["capacity_bytes"] == own.allocated_bytes
    assert cache["mha_ratio"] == round(mha_bytes(live.llm.config) / own.bytes_per_token, 2)


def test_a_request_id_is_given_back_if_it_is_plain_and_else_made(live: Live) -> None:
    assert ask(live, "/health", X_Request_Id="my-id.1")[2]["x-request-id"] == "my-id.1"
    made = {ask(live, "/health", X_Request_Id="not plain; at all")[2]["x-request-id"] for _ in range(2)}
    assert len(made) == 2


def test_other_origins_are_let_in_only_if_they_are_named(live: Live) -> None:
    origin = "https://example.org"
    assert ask(live, "/v1/models", Origin=origin)[2]["access-control-allow-origin"] is None
    with serving(LLM(kv_cache_bytes=4 << 20), cors_origins=(origin,)) as own:
        headers = ask(own, "/v1/models", Origin=origin)[2]
        assert headers["access-control-allow-origin"] == origin
        assert {"X-Request-Id", "X-LatentKV-Note"} <= set(headers["access-control-expose-headers"].split(", "))
        assert ask(own, "/v1/models", Origin="https://evil.example")[2]["access-control-allow-origin"] is None


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_is_a_line_of_json_a_request_without_anyones_text_unless_asked(log_prompts: bool) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with serving(LLM(kv_cache_bytes=4 << 20), log_prompts=log_prompts) as own:
            body = {"prompt": "a secret word", "max_tokens": 3, "user": "alice"}
            assert ask(own, "/v1/completions", body, X_Request_Id="the-one")[0] == 200
            for request_id, encoded, headers in (
                ("a-form", json.dumps(body).encode(), {"Content-Type": "application/x-www-form-urlencoded"}),
                ("packed", gzip.compress(json.dumps(body).encode()), {"Content-Encoding": "gzip"}),
            ):
                url, headers = f"{own.url}/v1/completions", {**headers, "X-Request-Id": request_id}
                with urllib.request.urlopen(urllib.request.Request(url, encoded, headers), timeout=20) as answer:
                    assert answer.status == 200
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    for request_id in ("the-one", "a-form", "packed"):
        (line,) = [json.loads(line) for line in lines if request_id in line]
        assert (line["path"], line["status"], line["user"]) == ("/v1/completions", 200, "alice")
        assert line["completion_tokens"] == 3 and line["prompt_tokens"] > 0 and line["seconds"] >= 0
    assert any("a secret word" in text for text in lines) == log_prompts


def test_health_can_be_asked_for_its_status_alone(live: Live) -> None:
    request = urllib.request.Request(f"{live.url}/health", method="HEAD")
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_speeds_are_those_of_the_last_seconds_whoever_asked_before(reference: LLM) -> None:
    now = 0.0
    metrics = Metrics(reference.engine, NAME, clock=lambda: now)
    assert metrics.speeds() == (0.0, 0.0)
    for _ in range(2):  # what is older than the last samples does not count
        reference.generate(PROMPT, SamplingParams(max_tokens=50))
        for _ in range(8):
            metrics.sample()
    now = 2.0
    assert metrics.speeds() == (0.0, 0.0)
    reference.generate(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    assert metrics.speeds()[0] == 25


def test_equal_times_between_tokens_are_counted_as_prometheus_does_one_after_another(reference: LLM) -> None:
    now = 0.0
    metrics, alone = Metrics(reference.engine, NAME, clock=lambda: now), CollectorRegistry()
    histogram = Histogram(
        "latentkv:inter_token_latency_seconds", "Between two tokens.", ["model_name"], registry=alone, buckets=SECONDS
    ).labels(model_name=NAME)
    clock = RequestClock(arrived=0.0)
    for now, count in ((1.0, 1), (1.01, 1), (1.25, 4), (801.25, 2)):
        before = clock.last
        metrics.tokens(clock, count)
        for _ in range(count if before is not None else 0):
            histogram.observe((now - before) / count)
    series = ("_bucket{", "_sum{", "_count{")

    def lines(text: bytes) -> list[str]:
        found = [line for line in text.decode().splitlines() if line.startswith("latentkv:inter_token")]
        return [line for line in found if any(part in line for part in series)]

    assert lines(metrics.text()) == lines(generate_latest(alone)) != []


def test_a_request_that_takes_too_long_is_given_up_and_its_pages_are_free() -> None:
    with serving(LLM(kv_cache_bytes=4 << 20), request_seconds=0.05) as own:
        body = {"prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True}
        status, answer, _ = ask(own, "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        own.wait_until_free()
        request = urllib.request.Request(
            f"{own.url}/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as stream:
            events = stream.read().decode().strip().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-1] == "data: [DONE]"
        own.wait_until_free()


def test_pieces_of_an_answer_are_sent_at_once_and_not_held_back_for_more() -> None:
    async def nodelay() -> int:
        connected: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            connected.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return await connected

    assert asyncio.run(nodelay()) != 0
