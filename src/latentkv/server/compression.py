"""`Inflate`: bodies that clients send compressed by gzip or deflate."""

from __future__ import annotations

import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentkv.server.errors import ApiError
from latentkv.server.security import send_error

WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
CHUNK = 1 << 16
"""Bytes that are given on at a time, so that whoever counts them can end a body that is too large."""
_DROPPED = (b"content-encoding", b"content-length")


class Inflate:
    """Gives a compressed body on as what it holds; `LimitBody` behind it counts that.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        coding = Headers(scope=scope).get("content-encoding", "").strip().lower() if scope["type"] == "http" else ""
        if coding in ("", "identity"):
            await self._app(scope, receive, send)
        elif coding in WINDOW_BITS:
            headers = [each for each in scope["headers"] if each[0] not in _DROPPED]
            await self._app({**scope, "headers": headers}, _Inflated(receive, WINDOW_BITS[coding]), send)
        else:
            message = f"Content-Encoding {coding[:40]!a} is not read here: send gzip, or the body as it is."
            await send_error(ApiError(415, message, headers={"Connection": "close"}), scope, send)


class _Inflated:
    """What a body holds, `CHUNK` bytes at a time."""

    def __init__(self, receive: Receive, window_bits: int) -> None:
        self._receive = receive
        self._window_bits = window_bits
        self._inflater: Any = zlib.decompressobj(window_bits)
        self._given = b""  # and not inflated yet
        self._more = True  # to come
        self._ended = False

    async def __call__(self) -> Message:
        while not self._ended:
            if not self._given and self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._given = message.get("body", b"")
                self._more = message.get("more_body", False)
            part = self._next_part()
            self._ended = not self._given and not self._more and len(part) < CHUNK
            if self._ended and not self._inflater.eof:
                raise HTTPException(400, "The body ends before its compression does: send all of it.")
            if part or self._ended:
                return {"type": "http.request", "body": part, "more_body": not self._ended}
        return await self._receive()

    def _next_part(self) -> bytes:
        if self._inflater.eof and self._given:  # gzip's members follow one another
            self._inflater = zlib.decompressobj(self._window_bits)
        try:
            part = self._inflater.decompress(self._given, CHUNK)
        except zlib.error:
            raise HTTPException(400, "The body is not compressed as its Content-Encoding says.") from None
        self._given = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        return part
