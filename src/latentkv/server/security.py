"""Who is let in, and how much they may send: ASGI middleware in front of every route."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentkv.server.context import HeldBytes
from latentkv.server.errors import RETRY_SECONDS, ApiError, body_for
from latentkv.server.routes.page import FILES

OPEN_PATHS = frozenset({"/health", *FILES})
"""That need no key, for GET and HEAD. Everything else does, whatever it is."""


DISCARDED_BYTES = 64 << 20
DISCARD_SECONDS = 5.0


class RequireKey:
    """Lets requests in that carry one of `keys`, and tells the routes whose prefixes they may share.

    Args:
        app: what is behind.
        keys: empty: everybody is let in.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] == "lifespan" or not self._keys or _is_open(scope):
            await self._app(scope, receive, send)
            return
        given = _given_key(Headers(scope=scope))
        # Every key is compared, and in constant time: how long it takes tells nothing of them.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if any(matches):
            scope["latentkv.salt"] = hashlib.sha256(given).hexdigest()
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(
                401,
                "This server needs an API key: send it as the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await send_error(error, scope, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


class LimitBody:
    """Refuses bodies of more than `max_bytes`, whether they say so or not, and those that together are too many.

    Args:
        app: what is behind; it keeps a body, in one form or another, until it has answered.
        max_bytes: of a body.
        max_held: of all of them at a time.
        held: where they are counted.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_held: int, held: HeldBytes) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_held = max_held
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not (declared.isascii() and declared.isdecimal()) or int(declared[:20]) > self._max_bytes:
            await _discard(receive)
            await send_error(self._too_large(), scope, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                self._held.bytes += len(message.get("body", b""))
                refused = (
                    self._too_large()
                    if seen > self._max_bytes
                    else _BUSY
                    if self._held.bytes > self._max_held
                    else None
                )
                if refused:
                    if message.get("more_body", False):
                        await _discard(receive)
                    # The one kind of error that passes through the reading of a body as it is.
                    raise HTTPException(refused.status, refused.message, headers=refused.headers)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held.bytes -= seen

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request's body is larger than the {self._max_bytes:,} bytes that this server takes: send less.",
            code="body_too_large",
            headers={"Connection": "close"},
        )


_BUSY = ApiError(
    503,
    "The requests under way hold as much text as this server takes at once: try again later.",
    code="server_busy",
    headers={"Connection": "close", "Retry-After": str(RETRY_SECONDS)},
)


class JsonByDefault:
    """Takes a body without a type of its own, as `curl -d` sends it, for JSON.

    Not from a web page: browsers let pages of other origins post forms unasked, and say so in `Origin`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = Headers(scope=scope)
            kind = headers.get("content-type", "")
            if "origin" not in headers and kind in ("", "application/x-www-form-urlencoded"):
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Let a client finish a body that is too large, within reason: most read no answer before they have."""
    left = DISCARDED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    """Answer with `error`."""
    body = json.dumps(body_for(scope["path"], error)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _is_open(scope: Scope) -> bool:
    """Judged by the path as it was sent: one that must first be decoded or joined to be open is not."""
    raw = scope.get("raw_path")
    path = scope["path"]
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and path in OPEN_PATHS
        and (raw is None or raw.partition(b"?")[0] == path.encode())
    )


def _given_key(headers: Headers) -> bytes:
    """As OpenAI's clients send it, or Anthropic's or Azure's."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "") or headers.get("api-key", "")
    return key.strip().encode("latin-1", "replace")
