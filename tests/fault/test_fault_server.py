"""docs/reliability.md, lines 3 to 9, 15 and 16: a server that people and accidents do things to."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
from pydantic import BaseModel, ValidationError

from latentkv import LLM
from latentkv.server.protocol.completions import CompletionRequest
from latentkv.server.protocol.operations import DetokenizeRequest
from latentkv.text.grammar import Grammar, GrammarCompiler
from live_server import Live, serving


@pytest.fixture(scope="module")
def dawdlers() -> Iterator[Live]:
    with serving(LLM(dtype="fp32", kv_cache_bytes=16 << 20, step_seconds=0.25), receive_seconds=0.4) as server:
        yield server


LONG = {"prompt": "The sea", "max_tokens": 1500, "ignore_eos": True, "temperature": 1.0}


def post(live: Live, path: str, body: object, key: str | None = None, timeout: float = 30):
    """(status, parsed body, headers)."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=timeout)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None, dict(answer.headers)


def get(live: Live, path: str, key: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def leave_in_the_middle(live: Live, *, stream: bool) -> None:
    """Start a completion longer than the cache could finish soon, and hang up after it began."""
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        while live.llm.engine.num_running == 0:
            time.sleep(0.005)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_line_03_a_request_that_can_never_fit_is_a_400_that_says_the_limit(live: Live) -> None:
    status, body, _ = post(live, "/v1/completions", {"prompt": [5] * 100_000, "max_tokens": 5})
    assert status == 400
    assert f"{live.llm.max_context:,}" in body["error"]["message"]
    assert post(live, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_line_03_a_request_larger_than_the_cache_is_a_400_too() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=1 << 20)) as small:
        room = small.llm.cache.num_pages * small.llm.cache.page_size
        assert room < small.llm.max_context
        status, body, _ = post(small, "/v1/completions", {"prompt": [5] * (room - 5), "max_tokens": 50})
        assert (status, f"{room:,}" in body["error"]["message"]) == (400, True)
        assert post(small, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_line_04_an_engine_without_progress_is_found_dead_and_everyone_is_told(monkeypatch) -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=4 << 20), stall_seconds=0.5, drain_seconds=0) as own:
        stuck = threading.Event()
        monkeypatch.setattr(own.llm.engine, "step", lambda: stuck.wait(60) and [])
        status, body, _ = post(own, "/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert (status, body["error"]["code"]) == (503, "engine_stopped")
        status, body = get(own, "/health")
        assert (status, json.loads(body)["status"]) == (503, "dead")
        assert post(own, "/v1/completions", {"prompt": "x"})[0] == 503
        stuck.set()


def test_line_05_steps_that_keep_failing_end_the_engine_openly(own: Live, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("broken")

    assert get(own, "/health")[0] == 200
    monkeypatch.setattr(own.llm.engine.runner, "submit", broken)
    answers = [post(own, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] for _ in range(4)]
    assert answers[:2] == [500, 500]
    assert answers[3] == 503
    status, body = get(own, "/health")
    assert (status, json.loads(body)["status"]) == (503, "dead")


def test_line_06_and_07_a_storm_of_clients_who_leave_frees_every_page_and_keeps_memory_flat(live: Live) -> None:
    process = psutil.Process()

    def storm(rounds: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: leave_somewhere(live, i), range(rounds)))
        live.wait_until_free()

    storm(48)
    before = process.memory_info().rss
    storm(96)
    assert process.memory_info().rss - before < 16 << 20
    assert live.server.model.thread.num_open == 0


def leave_somewhere(live: Live, number: int) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": number % 2 == 0, "seed": number}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(body)).encode()
        + b"\r\n\r\n"
        + body
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request[: len(request) - number % 3 * 20])  # some leave before they have asked
        time.sleep(number % 7 * 0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_line_07_pages_of_a_client_who_left_are_free_long_before_its_answer_would_have_ended(
    live: Live, stream: bool
) -> None:
    counters = live.llm.engine.counters
    before = counters.generated_tokens
    leave_in_the_middle(live, stream=stream)
    live.wait_until_free()
    assert counters.generated_tokens - before < LONG["max_tokens"]


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/v1/completions", {"n": 129}),
        ("/v1/completions", {"best_of": 129}),
        ("/v1/completions", {"prompt": ["x"] * 129}),
        ("/v1/completions", {"prompt": ["x"] * 100, "n": 2}),
        ("/v1/completions", {"stop": ["x"] * 17}),
        ("/v1/completions", {"stop": "x" * 1025}),
        ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}),
        ("/v1/completions", {"logprobs": 21}),
        ("/v1/completions", {"seed": 1 << 70}),
        ("/v1/completions", {"top_k": -2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 4097}),
        ("/v1/chat/completions", {"top_logprobs": 21, "logprobs": True}),
    ],
)
def test_line_09_every_number_has_a_cap(live: Live, path: str, given: dict) -> None:
    body = {"prompt": "x", "max_tokens": 2} if path == "/v1/completions" else {"messages": [], "max_tokens": 2}
    status, answer, _ = post(live, path, {**body, **given})
    assert status == 400, answer
    assert answer["error"]["message"]


def test_line_09_a_full_queue_answers_429_and_when_to_come_again() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=4 << 20), max_open=3) as own, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: post(own, "/v1/completions", {**LONG, "max_tokens": 60}), range(8)))
        refused = [headers for status, _, headers in answers if status == 429]
        assert refused and all(int(headers["retry-after"]) > 0 for headers in refused)
        assert [status for status, _, _ in answers].count(200) >= 3
        assert {status for status, _, _ in answers} == {200, 429}
        own.wait_until_free()


def test_line_09_a_body_that_is_too_large_is_a_413_whether_it_says_so_or_not() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=4 << 20), max_body_bytes=10_000) as own:
        status, body, _ = post(own, "/v1/completions", {"prompt": "x" * 20_000})
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        connection = http.client.HTTPConnection(own.url.removeprefix("http://"), timeout=10)
        chunks = (b"x" * 5_000 for _ in range(10))
        connection.request("POST", "/v1/completions", chunks, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_line_19_bodies_that_are_too_many_together_are_a_503_and_when_to_come_again() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=4 << 20), max_body_bytes=60_000, max_held_bytes=100_000) as own:
        host, port = own.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x" * 50_000}).encode()
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection((host, int(port))) as dawdler:
            dawdler.sendall(head % 59_000 + body)  # all but the end
            while own.server.held.bytes < len(body):
                time.sleep(0.001)
            status, _, headers = post(own, "/tokenize", body)
            assert status == 503 and int(headers["retry-after"]) > 0
            assert post(own, "/tokenize", {"prompt": "x"})[0] == 200
        while own.server.held.bytes:
            time.sleep(0.001)
        assert post(own, "/tokenize", body)[0] == 200


KEYS = ("a-key-of-alice", "a-key-of-bob")


@pytest.fixture(scope="module")
def locked():
    with serving(LLM(dtype="fp32", kv_cache_bytes=8 << 20), api_keys=KEYS) as server:
        yield server


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/metrics", "/stats", "/openapi.json", "/docs", "/nothing", "//", "/health/", "/health%2f",
        "/%68ealth", "/health/../metrics", "/page/../x", "/page/%2e%2e/x", "/;/health",
        "/v1/models?x=/health",
    ],
)  # fmt: skip
def test_line_15_every_path_but_a_few_open_ones_needs_a_key(locked: Live, path: str) -> None:
    assert get(locked, path)[0] == 401
    assert get(locked, path, "a-key-of-alic")[0] == 401
    assert get(locked, path, "a-key-of-alice ")[0] != 401


def test_line_15_open_paths_are_open_for_reading_only(locked: Live) -> None:
    assert get(locked, "/health")[0] == 200
    assert post(locked, "/health", {})[0] == 401
    assert post(locked, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 401
    for key in KEYS:
        assert post(locked, "/v1/completions", {"prompt": "x", "max_tokens": 1}, key)[0] == 200


def test_line_18_no_key_shares_prefixes_with_another(locked: Live) -> None:
    body = {"prompt": "The ship lay at anchor, and nobody spoke. " * 20, "max_tokens": 1}
    counters = locked.llm.engine.counters

    def hits(key: str) -> int:
        before = counters.prefix_hits
        assert post(locked, "/v1/completions", body, key)[0] == 200
        return counters.prefix_hits - before

    assert (hits(KEYS[0]), hits(KEYS[1])) == (0, 0)
    assert hits(KEYS[0]) > 0


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_line_16_no_address_in_a_request_is_ever_fetched(live: Live, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        part = {"type": kind, kind: {"url": url}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        assert post(live, "/v1/chat/completions", body)[0] == 400
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has knocked
            trap.accept()


BOMBS = [
    {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    {"json": {"type": "array", "minItems": 10**6, "maxItems": 10**9, "items": {"type": "string"}}},
    {"json": {"$ref": "http://127.0.0.1:1/schema.json"}},
    {"json": {"enum": ["x" * 50 + str(i) for i in range(1000)] * 3}},
    {"json": json.loads('{"properties": {"a": ' * 200 + "{}" + "}}" * 200)},
    {"grammar": "start: a\n" + "\n".join(f"a{'x' * i}: a{'x' * (i + 1)} a{'x' * (i + 1)}" for i in range(200))},
    {"json": {"type": "integer", "multipleOf": 1000003}},
]
TOO_MUCH_WORK = [
    {"json": {"type": "integer", "multipleOf": 10_000_019}},  # seconds, and states without end
    {"grammar": "start: R0\n" + "".join(f'R{i}: "a" R{i + 1}\n' for i in range(3000)) + 'R3000: "b"'},  # its stack
    {"json": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949)]}},
]


@pytest.mark.parametrize("bomb", BOMBS + TOO_MUCH_WORK, ids=lambda bomb: json.dumps(bomb)[:40])
def test_line_10_a_form_that_is_a_bomb_is_refused_or_bounded(live: Live, bomb: dict) -> None:
    body = {"prompt": "x", "max_tokens": 4, "structured_outputs": bomb}
    status, answer, _ = post(live, "/v1/completions", body)
    assert status in ((400,) if bomb in TOO_MUCH_WORK else (200, 400)), answer
    live.wait_until_free()


def test_line_10_who_asks_while_a_form_is_compiled_is_answered_first(live: Live, monkeypatch) -> None:
    compile, compiling, answered = GrammarCompiler.compile, threading.Event(), threading.Event()

    def compile_later(compiler: GrammarCompiler, kind: str, source: str) -> Grammar:
        compiling.set()
        answered.wait(60)
        return compile(compiler, kind, source)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_later)
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": "[a-c]{4}"}}
        slow = pool.submit(post, live, "/v1/completions", body, timeout=120)
        assert compiling.wait(60)
        try:
            assert get(live, "/health")[0] == 200
            assert post(live, "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
            assert not slow.done()
        finally:
            answered.set()
        assert slow.result()[0] == 200


@pytest.mark.parametrize("name", ["self", "messages", "tools", "documents", "add_generation_prompt"])
def test_line_14_a_request_cannot_set_what_a_template_is_given_from_elsewhere(live: Live, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: 1}}
    status, answer, _ = post(live, "/v1/chat/completions", body)
    assert status == 400 and name in answer["error"]["message"]


MANY_MISTAKES = [
    (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": [1] * 50_000}}),
    (CompletionRequest, {"prompt": [True] * 40_000}),
    (CompletionRequest, {str(i): 1 for i in range(50_000)}),
    (DetokenizeRequest, {"tokens": ["a"] * 50_000}),
]


@pytest.mark.parametrize(("form", "body"), MANY_MISTAKES)
def test_line_09_of_many_mistakes_a_few_are_described(form: type[BaseModel], body: dict) -> None:
    with pytest.raises(ValidationError) as found:
        form.model_validate(body)
    assert found.value.error_count() <= 4  # one a member of a union; describing all took seconds


def test_line_03_more_completions_than_ever_run_at_once_are_a_400() -> None:
    with serving(LLM(dtype="fp32", kv_cache_bytes=4 << 20), max_open=3) as own:
        status, answer, _ = post(own, "/v1/completions", {"prompt": "x", "n": 4})
        assert (status, answer["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHos", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_line_09_a_client_that_dawdles_over_a_request_is_cut_off(dawdlers: Live, sent: bytes) -> None:
    host, port = dawdlers.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            while connection.recv(4096):  # perhaps an answer to what came so far
                pass


def test_line_09_a_long_answer_is_not_taken_for_a_request_that_dawdles(dawdlers: Live) -> None:
    connection = http.client.HTTPConnection(dawdlers.url.removeprefix("http://"), timeout=30)
    for _ in range(2):  # the second time on a connection that was kept
        connection.request(
            "POST", "/v1/completions", json.dumps({**LONG, "max_tokens": 200}), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 200
    connection.close()
