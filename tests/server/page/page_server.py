"""A small real HTTP server that serves the page and answers it as it is told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import latentkv

PAGE = Path(latentkv.__file__).parent / "server" / "page"

# Trusted types forbid every way to make markup or a script of a string, besides what the rest forbids.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


class ConnectionCut(Exception):
    """A step of a reply: the connection ends here, without the end of the response."""


Step = str | bytes | dict[str, Any] | threading.Event | type[ConnectionCut]


@dataclass
class Reply:
    """What one `POST /v1/chat/completions` is answered.

    Attributes:
        steps: sent one after the other: bytes and strings as they are, a dict as the `data` of an event; an Event is
            waited for, ConnectionCut cuts the connection.
        status: of the response; other than 200, the only step is its JSON body.
        headers: of the response, besides the content type.
        content_type: of the response.
    """

    steps: list[Step]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "text/event-stream; charset=utf-8"


def piece(**delta: Any) -> dict[str, Any]:
    """A chunk with some of an answer."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def ending(reason: str = "stop", **usage: Any) -> list[Step]:
    """The last steps of a whole answer."""
    counts = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} | usage
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return [last, {"choices": [], "usage": counts}, "data: [DONE]\n\n"]


def whole(*texts: str) -> Reply:
    """An answer of these pieces, without pauses."""
    return Reply([*(piece(content=text) for text in texts), *ending()])


def refusal(status: int, message: str, **headers: str) -> Reply:
    """An error in OpenAI's form."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply([{"error": {"message": message, "type": "invalid_request_error"}}], status, named)


def numbers(**cache: Any) -> dict[str, Any]:
    """An answer of `GET /stats`, with these numbers of the cache."""
    return {
        "model": "tiny-model",
        "version": "0.1.0",
        "uptime_s": 61.0,
        "context": 4096,
        "chat_template": True,
        "requests": {"running": 1, "waiting": 2, "finished": 34},
        "throughput": {"generated_tokens_per_s": 41.25, "prompt_tokens_per_s": 512.0},
        "cache": {
            "format": "bf16",
            "used_tokens": 1_000,
            "capacity_tokens": 10_000,
            "used_bytes": 768_000,
            "capacity_bytes": 7_680_000,
            "kept_bytes": 384_000,
            "mha_bytes": 12_288_000,
            "mha_ratio": 16.0,
        }
        | cache,
    }


class PageServer:
    """Serves the page; a test scripts the answers and reads what was asked.

    Attributes:
        url: of the page, with the slash at the end.
        replies: the answers to come, in order.
        asked: the bodies of the chat requests that came.
        authorizations: their `Authorization` headers.
        stats: the answer of `GET /stats`; None answers 500.
        stats_asked: how often it was asked for.
        api_key: the key that requests must carry; None asks for none.
        hung_up: set when a client leaves before the end of its answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset()

    def reset(self) -> None:
        """Forgets what was scripted and what was asked."""
        self.replies: deque[Reply] = deque()
        self.asked: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.stats: dict[str, Any] | None = numbers()
        self.stats_asked = 0
        self.api_key: str | None = None
        self.hung_up = threading.Event()

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/stats", self._stats),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ],
            middleware=[Middleware(_PolicyHeader)],
        )

    def _refuses(self, request: Request) -> bool:
        return self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}"

    async def _stats(self, request: Request) -> Response:
        self.stats_asked += 1
        if self._refuses(request):
            return JSONResponse({"error": {"message": "An API key is needed."}}, 401)
        if self.stats is None:
            return JSONResponse({"error": {"message": "No numbers."}}, 500)
        return JSONResponse(self.stats)

    async def _chat(self, request: Request) -> Response:
        self.asked.append(json.loads(await request.body()))
        self.authorizations.append(request.headers.get("authorization"))
        if self._refuses(request):
            return JSONResponse({"error": {"message": "An API key is needed."}}, 401)
        reply = self.replies.popleft()
        if reply.status != 200:
            return JSONResponse(reply.steps[0], reply.status, reply.headers)
        return StreamingResponse(self._play(reply.steps), media_type=reply.content_type, headers=reply.headers)

    async def _play(self, steps: list[Step]) -> AsyncIterator[bytes]:
        hung_up = self.hung_up  # an answer that an earlier test left open does not set this test's
        try:
            for step in steps:
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(step, dict):
                    yield f"data: {json.dumps(step)}\n\n".encode()
                elif isinstance(step, (str, bytes)):
                    yield step.encode() if isinstance(step, str) else step
                else:
                    raise step
        except (asyncio.CancelledError, GeneratorExit):
            hung_up.set()
            raise


class _PolicyHeader:
    """Adds the content security policy to every response, as the page must be able to stand it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", POLICY.encode()))
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def serving() -> Iterator[PageServer]:
    """A server on a free port of this machine, for as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page_server = PageServer(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        config = uvicorn.Config(page_server.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield page_server
        finally:
            server.should_exit = True
            thread.join()
