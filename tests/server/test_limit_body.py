"""Bodies that are too large are refused as soon as they have come, and no sooner."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from latentkv.server.context import HeldBytes
from latentkv.server.security import LimitBody

MOST = 10


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    await Request(scope, receive).body()


def answer(sizes: list[int], *, max_held: int = 1000) -> tuple[int, int]:
    """The status for a body that comes in such pieces, and how many of them were left unread."""
    messages: deque[Message] = deque(
        {"type": "http.request", "body": b"x" * size, "more_body": i < len(sizes) - 1} for i, size in enumerate(sizes)
    )

    async def receive() -> Message:
        assert messages, "nothing comes after the last piece: whoever waits for more keeps the client waiting"
        return messages.popleft()

    async def send(message: Message) -> None:
        raise AssertionError("the app answers")

    held = HeldBytes()
    limit = LimitBody(read, MOST, max_held, held)
    try:
        asyncio.run(limit({"type": "http", "headers": []}, receive, send))
    except HTTPException as error:
        status = error.status_code
    else:
        status = 200
    assert held.bytes == 0
    return status, len(messages)


@pytest.mark.parametrize("sizes", [[11], [5, 6], [5, 6, 1], [11, 0], [5, 6, 7, 0]])
def test_a_body_that_is_too_large_is_a_413_once_all_of_it_has_come(sizes: list[int]) -> None:
    assert answer(sizes) == (413, 0)


@pytest.mark.parametrize("sizes", [[10], [5, 3], [8, 0]])
def test_bodies_that_are_too_many_together_are_a_503_once_all_of_this_one_has_come(sizes: list[int]) -> None:
    assert answer(sizes, max_held=7) == (503, 0)


@pytest.mark.parametrize("sizes", [[0], [10], [5, 5], [5, 5, 0]])
def test_a_body_within_the_limit_is_read(sizes: list[int]) -> None:
    assert answer(sizes) == (200, 0)
