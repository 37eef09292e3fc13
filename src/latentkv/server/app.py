"""`create_app`: the routes, behind those who guard them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from latentkv.errors import LatentKVError
from latentkv.server.compression import Inflate
from latentkv.server.context import Server
from latentkv.server.errors import ApiError, as_api_error, body_for, refusals
from latentkv.server.logs import LogRequests, logger
from latentkv.server.protocol.operations import ErrorResponse
from latentkv.server.routes import chat, completions, messages, ollama, operations, page, responses
from latentkv.server.security import JsonByDefault, LimitBody, RequireKey

EXPOSED = ("X-Request-Id", "X-LatentKV-Note", "Retry-After", "WWW-Authenticate")
"""Headers that scripts of other origins may read."""
WATCH_SECONDS = 1.0


def create_app(server: Server, *, died: Callable[[str], None] | None = None) -> ASGIApp:
    """An ASGI app that serves one model.

    Args:
        server: what is served, and how.
        died: called once with the reason if the engine dies.

    Returns:
        The app; its lifespan watches over the engine's thread, and drains it at the end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        watch = asyncio.create_task(_watch(server, died or (lambda reason: None)))
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await asyncio.to_thread(server.model.thread.drain, server.settings.drain_seconds)

    app = FastAPI(
        title="LatentKV",
        summary="An OpenAI-compatible server for models with Multi-head Latent Attention.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=refusals(ErrorResponse),
    )
    app.state.server = server
    for routes in (completions, chat, responses, messages, ollama, operations, page):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(LatentKVError, _answer)
    app.add_exception_handler(TimeoutError, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    _leave_out_422(app)

    settings = server.settings
    most_held = max(settings.max_body_bytes, settings.max_held_bytes)
    guarded: ASGIApp = LimitBody(JsonByDefault(app), settings.max_body_bytes, most_held, server.held)
    guarded = RequireKey(Inflate(guarded), server.settings.api_keys)
    if server.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=server.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return LogRequests(guarded)


async def _watch(server: Server, died: Callable[[str], None]) -> None:
    """Look after the engine: how fast it is, and, once, that it died, even if nobody asks for its health."""
    while True:
        server.metrics.sample()
        health = server.model.thread.health()
        if health.state == "dead":
            logger.critical("the engine died", extra={"fields": {"reason": health.reason}})
            died(health.reason)
            return
        await asyncio.sleep(WATCH_SECONDS)


async def _answer(request: HttpRequest, error: Exception) -> Response:
    found = as_api_error(error)
    if found.status == 500:
        logger.error("request failed", exc_info=error)
    # Written in ASCII: what it quotes of a request may not be valid Unicode.
    body = json.dumps(body_for(request.url.path, found))
    return Response(body, found.status, headers=found.headers, media_type="application/json")


async def _answer_http(request: HttpRequest, error: Exception) -> Response:
    found = error if isinstance(error, HTTPException) else HTTPException(500)
    known = {404: "There is no such path here: see /openapi.json.", 405: "This path takes another method."}
    message = known.get(found.status_code, str(found.detail))
    return await _answer(request, ApiError(found.status_code, message, headers=dict(found.headers or {})))


async def _answer_invalid(request: HttpRequest, error: Exception) -> Response:
    """Name the parameter that is wrong; one is enough."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    # Of a union every member complains; one whose type is right says more than the others.
    chosen = next((each for each in found if not each["type"].endswith("_type")), found[0] if found else {})
    return await _answer(request, _invalid(chosen))


def _invalid(found: dict[str, Any]) -> ApiError:
    where = [str(part)[:100] for part in found.get("loc", ()) if part not in ("body", "path", "query")]
    # Of a union each member's complaint carries its own name; the parameter is what the client wrote.
    param = where[0] if where else None
    kind = found.get("type", "")
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {found.get('ctx', {}).get('error', 'it ends early')}.")
    if kind == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)} is not a parameter that this server knows: leave it out.", param=param)
    if kind == "missing":
        return ApiError(400, f"{'.'.join(where) or 'A JSON body'} is missing.", param=param)
    return ApiError(400, f"{param or 'The body'}: {found.get('msg', 'is not valid')}.", param=param)


def _leave_out_422(app: FastAPI) -> None:
    """FastAPI documents 422 for invalid bodies; this server answers 400 as OpenAI does."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi
