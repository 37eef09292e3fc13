"""docs/reliability.md, line 25: of a request that can be read in two ways neither is believed."""

from __future__ import annotations

import socket

import pytest

from live_server import Live

BODY = b'{"prompt": "x"}'
LENGTH = b"Content-Length: 15\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"f\r\n" + BODY + b"\r\n0\r\n\r\n"


def answer(live: Live, headers: bytes, body: bytes, version: bytes = b"1.1") -> bytes:
    """All that comes until the server closes the connection."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /tokenize HTTP/" + version + b"\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + headers + b"\r\n" + body)
        text = b""
        while part := connection.recv(65536):
            text += part
        return text


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (LENGTH + CHUNKED, CHUNKS),
        (CHUNKED + LENGTH, CHUNKS),
        (CHUNKED + b"content-length: 0\r\n", CHUNKS),
        (LENGTH + b"Content-Length: 16\r\n", BODY),
        (b"Content-Length: 15, 16\r\n", BODY),
        (b"Content-Length: +15\r\n", BODY),
        (b"Content-Length: 0xf\r\n", BODY),
        (CHUNKED + CHUNKED, CHUNKS),
        (b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS),
        (b"Transfer-Encoding: identity\r\n", CHUNKS),
        (b"Transfer-Encoding : chunked\r\n", CHUNKS),
        (CHUNKED, b"+f\r\n" + BODY + b"\r\n0\r\n\r\n"),
        (CHUNKED, b"0xf\r\n" + BODY + b"\r\n0\r\n\r\n"),
        (CHUNKED, b"-1\r\n" + BODY + b"\r\n0\r\n\r\n"),
        (CHUNKED, b"f" * 21 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    ],
)
def test_line_25_a_body_of_two_lengths_or_of_a_bad_one_is_a_400_and_the_connection_ends(
    live: Live, headers: bytes, body: bytes
) -> None:
    text = answer(live, headers, body + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert text.startswith(b"HTTP/1.1 400") or not text
    assert text.count(b"HTTP/1.1") <= 1


def test_line_25_a_chunked_body_of_http_1_0_is_refused(live: Live) -> None:
    assert answer(live, CHUNKED, CHUNKS, b"1.0").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("headers", "body"),
    [(LENGTH, BODY), (CHUNKED, CHUNKS), (LENGTH + LENGTH, BODY), (b"X: a\r\n b\r\n" + LENGTH, BODY)],
)
def test_one_length_is_read(live: Live, headers: bytes, body: bytes) -> None:
    assert answer(live, headers + b"Connection: close\r\n", body).startswith(b"HTTP/1.1 200")
