"""A client of any OpenAI-compatible server that notes when each piece of an answer came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Self, cast

import httpx2

from latentkv.bench.load.workload import LoadRequest

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
NO_TEXT = "no text"
"""The kind of failure of an answer that is whole, but empty."""
_CONNECT_SECONDS = 10.0
# Shorter than servers wait (uvicorn: 5 s), so that no request is sent down a connection that is being closed.
_KEEP_IDLE_SECONDS = 2.0
_LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class Failure:
    """Why a request failed.

    Attributes:
        kind: what is counted: "HTTP 429", "disconnect", "timeout", ...
        message: what the server or the connection said, one line.
        status: of the HTTP answer, None where there was none.
    """

    kind: str
    message: str
    status: int | None = None


@dataclass
class Answer:
    """What became of one request; times are `perf_counter`'s seconds.

    Attributes:
        due: when it should have been sent; latencies count from here.
        sent: when it was.
        chunk_times: when each chunk with text came.
        ended: when the stream ended, or failed.
        prompt_tokens: of the prompt, as the server counts; None: it did not say. Likewise:
        cached_tokens: those of the prompt that it had cached.
        output_tokens: generated.
        failure: None where the whole answer came.
        answered: whether the server has begun to answer.
    """

    due: float
    sent: float
    chunk_times: list[float] = field(default_factory=list[float])
    ended: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    failure: Failure | None = None
    answered: bool = False


@dataclass(frozen=True)
class RequestForm:
    """How a request is written for one server: its model, its endpoint, and what every request has besides.

    Attributes:
        model: as the server calls it.
        endpoint: which of the two.
        fields: of the JSON body; they replace what this class would write.
    """

    model: str
    endpoint: Endpoint
    fields: Mapping[str, Any]

    def body(self, request: LoadRequest) -> dict[str, Any]:
        """The JSON of `request`."""
        prompt = (
            {"messages": [{"role": "user", "content": request.prompt}]}
            if self.endpoint == "chat"
            else {"prompt": request.prompt}
        )
        own = {"model": self.model, "max_tokens": request.output_tokens, "temperature": 0, "stream": True}
        return {**own, **prompt, **self.fields}


class ServeClient:
    """Connections to one server, as many as requests are under way; an async context manager."""

    def __init__(self, url: str, *, api_key: str | None, timeout: float) -> None:
        """Prepare to talk to the server at `url` (without /v1); a request that takes over `timeout` seconds fails."""
        self.url = url
        self._timeout = timeout
        # Compressed streams arrive in lumps.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            verify=not url.startswith("http:"),  # reading the system's certificates takes longer than a request
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_IDLE_SECONDS
            ),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def models(self) -> list[str] | Failure:
        """The names of the models that the server has."""
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._http.get("/v1/models")
            if response.status_code != 200:
                return _refusal(response)
            return [str(model["id"]) for model in response.json()["data"]]
        except (httpx2.HTTPError, TimeoutError, ValueError, KeyError, TypeError) as error:
            return _failure(error)

    async def ask(self, form: RequestForm, request: LoadRequest, due: float) -> Answer:
        """Send a request and read its answer to the end; what fails is in the answer, nothing is raised."""
        answer = Answer(due=due, sent=perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    await self._exchange(form, request, answer)
                except httpx2.RemoteProtocolError:
                    if answer.answered:
                        raise
                    # A kept connection that the server was about to close; a server that fails will do so once more.
                    await self._exchange(form, request, answer)
        except (httpx2.HTTPError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
            answer.failure = _failure(error)
        if not answer.ended or answer.failure:
            answer.ended = perf_counter()
        return answer

    async def _exchange(self, form: RequestForm, request: LoadRequest, answer: Answer) -> None:
        async with self._http.sse(PATHS[form.endpoint], method="POST", json=form.body(request)) as events:
            answer.answered = True
            if events.response.status_code != 200:
                await events.response.aread()
                answer.failure = _refusal(events.response)
            else:
                answer.failure = await _read(events, answer)


async def _read(events: httpx2.EventSource, answer: Answer) -> Failure | None:
    """Note every event of a stream; says why where the answer is not whole."""
    finished = False
    async for event in events:
        now = perf_counter()
        if event.data == "[DONE]":
            answer.ended = now
            finished = True
            continue
        chunk = cast("dict[str, Any]", json.loads(event.data))
        if error := chunk.get("error"):
            return Failure("error in the stream", _one_line(error))
        if usage := chunk.get("usage"):
            _note_usage(usage, answer)
        for choice in chunk.get("choices") or ():
            if _has_text(choice):
                answer.chunk_times.append(now)
            finished = finished or bool(choice.get("finish_reason"))
    if not finished:
        return Failure("disconnect", "the stream ended before the answer did")
    return None if answer.chunk_times else Failure(NO_TEXT, "the answer has no text")


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of a chunk brings something generated; the first chunk of a chat brings only the role."""
    if "delta" not in choice:
        return bool(choice.get("text"))
    return any(value for key, value in choice["delta"].items() if key != "role")


def _note_usage(usage: Mapping[str, Any], answer: Answer) -> None:
    answer.prompt_tokens = int(usage["prompt_tokens"])
    answer.output_tokens = int(usage["completion_tokens"])
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    answer.cached_tokens = None if cached is None else int(cached)


def _refusal(response: httpx2.Response) -> Failure:
    """What a status other than 200 means; the body has been read."""
    try:
        message: Any = response.json()
    except ValueError:
        message = response.text
    return Failure(f"HTTP {response.status_code}", _one_line(message), response.status_code)


def _failure(error: Exception) -> Failure:
    """The kind of what went wrong on the way."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return Failure("timeout", "no whole answer in time")
    if isinstance(error, httpx2.ConnectError):
        return Failure("cannot connect", _one_line(str(error)))
    if isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.SSEError):
        return Failure("disconnect", _one_line(str(error) or type(error).__name__))
    return Failure("malformed answer", _one_line(f"{type(error).__name__}: {error}"))


def _one_line(message: Any) -> str:
    """The sentence in a server's error, however it is wrapped, cut where it gets long."""
    for key in ("error", "detail", "message"):
        if isinstance(message, dict) and key in message:
            message = cast("dict[str, Any]", message)[key]
    line = " ".join(str(message).split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 1] + "…"
