"""`answer_all`: requests through the server's own app, in this process: its checks, its defaults, its batching."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import uuid4

import httpx2

from latentkv.batch.requests import MAX_BYTES, BatchRequest
from latentkv.errors import EngineStoppedError
from latentkv.server.app import create_app
from latentkv.server.context import Server
from latentkv.server.errors import ApiError
from latentkv.server.settings import ServerSettings

SETTINGS = ServerSettings(
    max_body_bytes=MAX_BYTES,
    max_held_bytes=MAX_BYTES,
    max_open=1 << 20,
    request_seconds=math.inf,
    stall_seconds=math.inf,
)
"""Of a server that one file asks, and no strangers: what it may take is as long as it takes."""

AHEAD = 8
"""Requests that are read while as many as can run do."""
LOOK_SECONDS = 0.2

_STREAM = ApiError(400, "stream: a batch's answers come whole: leave stream out.", param="stream")

Listener = Callable[[BatchRequest, int, str, object], None]
"""Called with a request, and the status, the id and the body of its answer."""


async def answer_all(
    server: Server,
    requests: Sequence[BatchRequest],
    answered: Listener,
    generated: Callable[[int], None] = lambda tokens: None,
    *,
    at_once: int,
) -> None:
    """Have all requests answered, each as `POST` to its path would be.

    Args:
        server: made with `SETTINGS`.
        requests: what to ask.
        answered: called with each answer when it is there, in any order.
        generated: called with the number of new tokens, now and then.
        at_once: requests that run together at most.

    Raises:
        EngineStoppedError: the model computes no more; what it did not get to has no answer.
    """
    left, thread = iter(requests), server.model.thread
    transport = httpx2.ASGITransport(create_app(server), raise_app_exceptions=False)
    headers = {"Content-Type": "application/json"}
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://batch", headers=headers, timeout=None
    ) as client:

        async def ask() -> None:
            for request in left:
                if request.streams:
                    answered(request, _STREAM.status, uuid4().hex, _STREAM.body)
                    continue
                answer = await client.post(request.url, content=request.body)
                if answer.status_code == 503:
                    raise EngineStoppedError(thread.health().reason or str(answer.json()["error"]["message"]))
                answered(request, answer.status_code, answer.headers["x-request-id"], answer.json())

        asking = [asyncio.create_task(ask()) for _ in range(min(at_once + AHEAD, len(requests)))]
        looking = asyncio.create_task(_count(server, generated))
        try:
            await asyncio.gather(*asking)
        finally:
            for task in (*asking, looking):
                task.cancel()
            for task in (*asking, looking):
                with suppress(asyncio.CancelledError, Exception):  # the first to fail is what is raised
                    await task


async def _count(server: Server, generated: Callable[[int], None]) -> None:
    """Tell of the tokens that the engine chooses."""
    counters, known = server.model.llm.engine.counters, 0
    try:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            known, new = counters.generated_tokens, counters.generated_tokens - known
            generated(new)
    finally:
        generated(counters.generated_tokens - known)
