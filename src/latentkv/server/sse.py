"""Server-sent events, the form of OpenAI's streams."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any
from uuid import uuid4

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from latentkv.server.errors import as_api_error
from latentkv.server.logs import logger

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the schema of a route that can stream."""
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold pieces back
HOLE = uuid4().hex
"""A text that stands in no event but where it is put."""


def data(chunk: BaseModel) -> str:
    """One event; of what is None nothing is written, but a finish_reason of null is."""
    fields = chunk.model_dump(exclude_none=True)
    for choice in fields.get("choices", ()):
        choice.setdefault("finish_reason", None)
    return f"data: {json.dumps(fields)}\n\n"


class TextEvent:
    """Events that are alike but for one text: written once, and that text into each.

    Args:
        event: one of them, whose text is `HOLE`.
    """

    def __init__(self, event: str) -> None:
        self._before, self._after = event.split(json.dumps(HOLE))

    def of(self, text: str) -> str:
        """The one with this text."""
        return f"{self._before}{json.dumps(text)}{self._after}"


def _failed(error: Exception) -> str:
    return f"data: {json.dumps(as_api_error(error).body)}\n\n"


class EventStream(StreamingResponse):
    """`events`, then `done`; an error becomes a last event of its own, as OpenAI's clients expect it.

    Args:
        events: written by `data`.
        close: called at the end, however it comes, even before the first event.
        done: the last event.
        failed: writes an error.
        media_type: of the stream.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[], None],
        *,
        done: str = DONE,
        failed: Callable[[Exception], str] = _failed,
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(_with_errors(events, done, failed), media_type=media_type, headers=HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _with_errors(
    events: AsyncIterator[str], done: str, failed: Callable[[Exception], str]
) -> AsyncGenerator[str]:
    try:
        async for event in events:
            yield event
    except Exception as error:  # the status was sent long ago, so it comes as an event
        if as_api_error(error).status == 500:
            logger.error("stream failed", exc_info=error)
        yield failed(error)
    yield done
