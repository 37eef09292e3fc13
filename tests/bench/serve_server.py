"""An OpenAI-compatible server on a free port of this machine, whose delays, counts and failures are known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """What it does, to be set before it is asked, and what it was asked.

    A prompt has len(prompt) / 4 + `overhead` tokens. `failures` says what becomes of the n-th request that is no
    calibration: a status, or "cut" (the connection breaks), "short" (the stream ends early), "error" (an error in the
    stream), "silent" (no text), "hang".
    """

    first_delay: float = 0.0
    gap: float = 0.0
    tokens_per_chunk: int = 1
    overhead: int = 0
    usage: bool = True
    models: tuple[str, ...] = ("tiny",)
    key: str | None = None
    refused_fields: tuple[str, ...] = ()
    failures: dict[int, int | str] = field(default_factory=dict)
    always: int | str | None = None
    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    @property
    def counted(self) -> list[dict]:
        """Requests that were no calibration: those ask for one token."""
        return [body for body in self.bodies if body["max_tokens"] > 1]

    async def list_models(self, request: Request) -> Response:
        if self._locked(request):
            return JSONResponse({"error": {"message": "Incorrect key"}}, 401)
        return JSONResponse({"data": [{"id": name} for name in self.models]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self._locked(request):
            return JSONResponse({"error": {"message": "Incorrect key"}}, 401)
        if body["model"] not in self.models:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        for name in self.refused_fields:
            if name in body:
                return JSONResponse({"error": {"message": f"unknown field {name}"}}, 400)
        fate = self.always
        if body["max_tokens"] > 1:
            fate = self.failures.get(len(self.counted) - 1, fate)
        if isinstance(fate, int):
            return JSONResponse({"error": {"message": f"refused with {fate}"}}, fate)
        stream = self._stream(body, fate, chat="chat" in request.url.path)
        return StreamingResponse(stream, media_type="text/event-stream")

    def _locked(self, request: Request) -> bool:
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _stream(self, body: dict, fate: str | None, *, chat: bool) -> AsyncIterator[bytes]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            tokens = body["max_tokens"]
            if chat:
                yield _event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            await asyncio.sleep(self.first_delay if fate != "hang" else 60)
            for index in range(0, tokens, self.tokens_per_chunk):
                if index:
                    await asyncio.sleep(self.gap)
                    if fate == "cut":
                        raise ConnectionAbortedError
                    if fate == "short":
                        return
                    if fate == "error":
                        yield _event(error={"message": "out of memory"})
                        return
                text = "" if fate == "silent" else " word" * min(self.tokens_per_chunk, tokens - index)
                yield _event(choices=[{"delta": {"content": text}} if chat else {"text": text}])
            yield _event(choices=[{"delta": {}, "finish_reason": "length"} if chat else _ENDED])
            if self.usage and "stream_options" in body:
                prompt = body["messages"][0]["content"] if chat else body["prompt"]
                count = len(prompt) // 4 + self.overhead
                yield _event(choices=[], usage={"prompt_tokens": count, "completion_tokens": tokens})
            yield b"data: [DONE]\n\n"
        finally:
            self.under_way -= 1


_ENDED = {"text": "", "finish_reason": "length"}


def _event(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@contextmanager
def running(**behaviour: object) -> Iterator[FakeServer]:
    """A `FakeServer` that listens while the block runs."""
    fake = FakeServer(**behaviour)  # type: ignore[arg-type]
    routes = [Route("/v1/models", fake.list_models)]
    routes += [Route(f"/v1/{path}", fake.complete, methods=["POST"]) for path in ("completions", "chat/completions")]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        if not thread.is_alive():
            raise RuntimeError("the test's server did not start")
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.force_exit = server.should_exit = True
        thread.join()
