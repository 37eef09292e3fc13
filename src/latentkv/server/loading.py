"""`LoadingApp`: answers from the first moment on, and hands over to the model's app when that stands."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentkv.server.errors import ApiError, body_for

RETRY_SECONDS = 5
_LOADING = "The model is being loaded: /health says when requests can be served."


class LoadingApp:
    """An ASGI app that is another one as soon as there is one.

    Args:
        load: makes the other app, in a thread of its own.
        ready: called when the other app has begun.
        failed: called with what `load` raised, which ends the waiting.
    """

    def __init__(
        self, load: Callable[[], ASGIApp], ready: Callable[[], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._load = load
        self._ready = ready
        self._failed = failed
        self._app: ASGIApp | None = None
        self._lifespan: _Lifespan | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer(scope, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        loading = asyncio.create_task(self._take_over())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        loading.cancel()  # its thread goes on, and nobody waits for it
        if self._lifespan is not None:
            await self._lifespan.end()
        await send({"type": "lifespan.shutdown.complete"})

    async def _take_over(self) -> None:
        try:
            app = await _in_thread(self._load)
        except Exception as error:
            self._failed(error)
            return
        self._lifespan = _Lifespan(app)
        await self._lifespan.begin()
        self._app = app
        self._ready()


async def _in_thread(work: Callable[[], ASGIApp]) -> ASGIApp:
    """What `work` returns. Unlike asyncio's own threads, this one keeps no process alive that is to end."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[ASGIApp] = loop.create_future()

    def set_result(app: ASGIApp | None, error: BaseException | None) -> None:
        if result.done():  # nobody waits any more
            return
        if app is not None:
            result.set_result(app)
        elif error is not None:
            result.set_exception(error)

    def run() -> None:
        app = error = None
        try:
            app = work()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(set_result, app, error)

    threading.Thread(target=run, name="latentkv-loading", daemon=True).start()
    return await result


class _Lifespan:
    """Begins and ends an app, as a server does.

    Args:
        app: that is told.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Future[None] | None = None

    async def begin(self) -> None:
        """Wait until it has begun."""
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.ensure_future(self._run(scope))
        await self._tell("lifespan.startup")

    async def end(self) -> None:
        """Wait until it has ended."""
        await self._tell("lifespan.shutdown")
        if self._task is not None:
            await self._task

    async def _run(self, scope: Scope) -> None:
        await self._app(scope, self._told.get, self._said.put)

    async def _tell(self, what: str) -> None:
        await self._told.put({"type": what})
        await self._said.get()


async def _answer(scope: Scope, send: Send) -> None:
    """503, for as long as the model is not there."""
    if scope["path"] == "/health":
        body = {"status": "loading", "reason": _LOADING}
    else:
        body = body_for(scope["path"], ApiError(503, _LOADING, code="loading"))
    text = b"" if scope["method"] == "HEAD" else json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(text)).encode()),
        (b"retry-after", str(RETRY_SECONDS).encode()),
        (b"connection", b"close"),  # what was sent is not read
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": text})
