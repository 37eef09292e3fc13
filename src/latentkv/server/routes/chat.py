"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from uuid import uuid4

from fastapi import APIRouter

from latentkv.completion import Completion
from latentkv.engine import Request, TokenLogprobs
from latentkv.server.context import Context, InContext
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    TokenLogprob,
    TopLogprob,
)
from latentkv.server.protocol.sampling import Usage
from latentkv.server.sse import EventStream, data

router = APIRouter()


@router.post("/v1/chat/completions", response_model_exclude_none=True)
async def chat(body: ChatRequest, context: InContext) -> ChatResponse:
    """Answer a conversation."""
    context.require_model(body.model)
    request = await context.model.off_loop(lambda: _request(context, body))
    job = Job(context, [request])
    writer = _Writer(context)
    if body.stream:
        events = writer.stream(job, usage=body.includes_usage)
        return EventStream(events, job.close)  # pyright: ignore[reportReturnType] FastAPI sends it as it is
    return writer.whole(await job.completions(), job.usage)


class _Writer:
    """Writes answers."""

    def __init__(self, context: Context) -> None:
        self._model = context.model
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())

    def whole(self, completions: list[Completion], usage: Usage) -> ChatResponse:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=completion.text),
                logprobs=self._logprobs(completion.logprobs),
                finish_reason=completion.finish_reason,
            )
            for index, completion in enumerate(completions)
        ]
        return ChatResponse(id=self._id, created=self._created, model=self._model.name, choices=choices, usage=usage)

    async def stream(self, job: Job, *, usage: bool) -> AsyncGenerator[str]:
        for index in range(len(job.choices)):
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
        async for index, piece in job.pieces():
            if piece.text or piece.logprobs:
                delta = ChatDelta(content=piece.text)
                yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=self._logprobs(piece.logprobs)))
            if piece.finish_reason:
                yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=piece.finish_reason))
        if usage:
            yield self._chunk(usage=job.usage)

    def _chunk(self, *choices: ChatChunkChoice, usage: Usage | None = None) -> str:
        return data(
            ChatChunk(id=self._id, created=self._created, model=self._model.name, choices=list(choices), usage=usage)
        )

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        if entries is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._token(entry.token_id, entry.logprob).model_dump(),
                    top_logprobs=[self._token(token, value) for token, value in entry.top.items()],
                )
                for entry in entries
            ]
        )

    def _token(self, token: int, logprob: float) -> TopLogprob:
        text = self._model.text_of([token])
        return TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()))


def _request(context: Context, body: ChatRequest) -> Request:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true: set it, or leave it out.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
    llm = context.model.llm
    prompt = llm.chat_prompt(body.messages, **body.chat_template_kwargs)
    params = body.sampling(
        body.max_completion_tokens or body.max_tokens or context.model.room_after(len(prompt)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return llm.request(prompt, llm.chat_params(params))
