"""The client against a real server, and against streams that are split anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from time import perf_counter

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_server import FakeServer, running

from latentkv.bench.load.client import Answer, Endpoint, Failure, RequestForm, ServeClient
from latentkv.bench.load.workload import LoadRequest

USAGE = {"stream_options": {"include_usage": True}}
REQUEST = LoadRequest("Call me Ishmael.", 4, 5)


def ask(url: str, *, endpoint: Endpoint = "completions", timeout: float = 20.0, model: str = "tiny") -> Answer:
    async def one() -> Answer:
        async with ServeClient(url, api_key=None, timeout=timeout) as client:
            return await client.ask(RequestForm(model, endpoint, USAGE), REQUEST, perf_counter())

    return asyncio.run(one())


@pytest.fixture
def server():
    with running() as fake:
        yield fake


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_an_answer_has_a_time_for_each_chunk_with_text_and_the_servers_counts(server: FakeServer, endpoint: Endpoint):
    server.first_delay, server.gap = 0.1, 0.02
    answer = ask(server.url, endpoint=endpoint)
    assert answer.failure is None
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (4, 5, None)
    assert len(answer.chunk_times) == 5
    assert answer.due <= answer.sent
    # At least, for the server waits as long after it was asked; a chat's first chunk, its role, came at once.
    assert answer.chunk_times[0] - answer.sent >= 0.1
    assert answer.chunk_times[4] - answer.sent >= 0.18
    assert answer.chunk_times == sorted(answer.chunk_times)
    assert answer.ended >= answer.chunk_times[4]


def test_a_request_says_what_it_wants(server: FakeServer):
    ask(server.url)
    assert server.bodies == [
        {
            "model": "tiny",
            "prompt": "Call me Ishmael.",
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_fields_of_the_user_replace_the_clients_own():
    body = RequestForm("m", "chat", {"temperature": 1, "top_k": 3}).body(REQUEST)
    assert (body["temperature"], body["top_k"]) == (1, 3)
    assert body["messages"] == [{"role": "user", "content": "Call me Ishmael."}]
    assert "prompt" not in body


def test_several_tokens_in_a_chunk_are_counted_by_the_server(server: FakeServer):
    server.tokens_per_chunk = 2
    answer = ask(server.url)
    assert (len(answer.chunk_times), answer.output_tokens) == (3, 5)


def test_a_server_without_usage_leaves_the_counts_open(server: FakeServer):
    server.usage = False
    answer = ask(server.url)
    assert answer.failure is None
    assert answer.prompt_tokens is answer.output_tokens is None
    assert len(answer.chunk_times) == 5


@pytest.mark.parametrize(
    ("fate", "kind", "said"),
    [
        (429, "HTTP 429", "refused with 429"),
        (500, "HTTP 500", "refused with 500"),
        ("cut", "disconnect", ""),
        ("short", "disconnect", "the stream ended before the answer did"),
        ("error", "error in the stream", "out of memory"),
        ("silent", "no text", ""),
    ],
)
def test_every_kind_of_failure_has_a_name(server: FakeServer, fate: int | str, kind: str, said: str):
    server.always = fate
    failure = ask(server.url).failure
    assert failure is not None
    assert failure.kind == kind
    assert said in failure.message
    assert failure.status == (fate if isinstance(fate, int) else None)


@pytest.mark.parametrize(("closed", "kind"), [(1, None), (2, "disconnect")])
def test_a_connection_that_is_closed_before_an_answer_is_tried_once_more(closed: int, kind: str | None):
    event = b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(event)}\r\n\r\n".encode()

    async def asked() -> Answer:
        connections = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.readuntil(b"}")
            if connections > closed:
                writer.write(head + event)
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with ServeClient(url, api_key=None, timeout=20.0) as client:
                return await client.ask(RequestForm("m", "completions", {}), REQUEST, perf_counter())

    failure = asyncio.run(asked()).failure
    assert (failure and failure.kind) == kind


def test_what_came_before_a_disconnect_is_kept(server: FakeServer):
    server.always = "cut"
    answer = ask(server.url)
    assert len(answer.chunk_times) == 1
    assert answer.ended >= answer.chunk_times[0]


def test_a_request_that_takes_too_long_is_a_timeout(server: FakeServer):
    server.always = "hang"
    answer = ask(server.url, timeout=0.2)
    assert answer.failure is not None and answer.failure.kind == "timeout"
    assert answer.ended - answer.sent >= 0.2


def test_a_server_that_is_not_there_cannot_be_connected_to(server: FakeServer, unused_url: str):
    answer = ask(unused_url)
    assert answer.failure is not None and answer.failure.kind == "cannot connect"


def test_models_are_listed_with_the_key(server: FakeServer):
    server.key, server.models = "secret", ("a", "b")

    async def listed(key: str) -> list[str] | Failure:
        async with ServeClient(server.url, api_key=key, timeout=20.0) as client:
            return await client.models()

    assert asyncio.run(listed("secret")) == ["a", "b"]
    refused = asyncio.run(listed("wrong"))
    assert isinstance(refused, Failure)
    assert (refused.kind, refused.message, refused.status) == ("HTTP 401", "Incorrect key", 401)


# Streams that no server of ours writes, by a transport that hands out bytes as told.


class _Pieces(httpx2.AsyncByteStream):
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def read(pieces: list[bytes], content_type: str = "text/event-stream") -> Answer:
    def respond(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": content_type}, stream=_Pieces(pieces))

    async def one() -> Answer:
        async with ServeClient("http://server", api_key=None, timeout=20.0) as client:
            client._http = httpx2.AsyncClient(base_url="http://server", transport=httpx2.MockTransport(respond))
            return await client.ask(RequestForm("m", "completions", {}), REQUEST, perf_counter())

    return asyncio.run(one())


def event(end: str = "\n", **chunk: object) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}{end}{end}".encode()


def stream(end: str) -> bytes:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    return b"".join(
        [
            f": a comment{end}{end}event: message{end}id: 7{end}".encode(),
            event(end, choices=[{"text": " Größe 鲸"}], usage=None),
            f'data: {{"choices":{end}data:[{{"text": "two lines of data"}}]}}{end}{end}'.encode(),
            event(end, choices=[{"text": "", "finish_reason": "stop"}], usage=usage),
            f"data:[DONE]{end}{end}".encode(),
        ]
    )


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 500), max_size=12))
def test_a_stream_means_the_same_wherever_it_is_split(end: str, cuts: list[int]):
    whole = stream(end)
    places = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    answer = read([whole[a:b] for a, b in pairwise(places)])
    assert answer.failure is None
    assert len(answer.chunk_times) == 2
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (9, 4, 3)


def test_a_stream_means_the_same_byte_by_byte():
    answer = read([bytes([byte]) for byte in stream("\r\n")])
    assert (answer.failure, len(answer.chunk_times), answer.output_tokens) == (None, 2, 3)


def test_a_stream_may_end_without_done_if_the_answer_did():
    assert read([event(choices=[{"text": "a", "finish_reason": "stop"}])]).failure is None


@pytest.mark.parametrize(
    "data", [b"data: {\n\n", b"data: []\n\n", b"data: 5\n\n", event(choices=5), event(choices=["a"]), event(usage=[1])]
)
def test_a_stream_of_something_else_is_malformed(data: bytes):
    failure = read([data]).failure
    assert failure is not None and failure.kind == "malformed answer"


def test_an_answer_that_is_no_stream_is_malformed():
    failure = read([b'{"choices": [{"text": "all at once"}]}'], "application/json").failure
    assert failure is not None and failure.kind == "malformed answer"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too\\n long", "code": 400}}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": "busy"}', "busy"),
        (b"Bad Gateway", "Bad Gateway"),
        (b"x" * 1000, "x" * 199 + "…"),
    ],
)
def test_what_a_server_says_becomes_one_short_line(body: bytes, said: str):
    def respond(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(400, content=body)

    async def one() -> Answer:
        async with ServeClient("http://server", api_key=None, timeout=20.0) as client:
            client._http = httpx2.AsyncClient(base_url="http://server", transport=httpx2.MockTransport(respond))
            return await client.ask(RequestForm("m", "completions", {}), REQUEST, perf_counter())

    failure = asyncio.run(one()).failure
    assert failure is not None and failure.message == said
