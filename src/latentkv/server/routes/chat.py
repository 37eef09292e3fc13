"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from latentkv.completion import Completion
from latentkv.engine import TokenLogprobs
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.conversation import Conversation, begin_conversation
from latentkv.server.generation import Job
from latentkv.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    FunctionCall,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from latentkv.server.protocol.sampling import Usage
from latentkv.server.sse import HOLE, STREAMS, EventStream, TextEvent, data
from latentkv.text.tools import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAMS)
async def chat(body: ChatRequest, context: InContext) -> Response:
    """Answer a conversation."""
    conversation = await begin_conversation(context, body)
    job = Job(context, [conversation.request], keep=context.model.format.markers)
    writer = _Writer(context, conversation, len(job.choices))
    if body.stream:
        events = writer.stream(job, usage=body.includes_usage, always=body.counts_as_it_goes)
        return EventStream(events, job.close)
    return _as_json(writer.whole(await job.completions(), job.usage))


def _as_json(answer: ChatResponse) -> Response:
    """Of what is None nothing is written, but a content of null is: clients ask for it beside tool calls."""
    fields = answer.model_dump(exclude_none=True)
    for choice in fields["choices"]:
        choice["message"].setdefault("content", None)
    return Response(json.dumps(fields), media_type="application/json")


class _Writer:
    """Writes answers."""

    def __init__(self, context: Context, conversation: Conversation, choices: int) -> None:
        self._model = context.model
        self._conversation = conversation
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())

    def whole(self, completions: list[Completion], usage: Usage) -> ChatResponse:
        choices: list[ChatChoice] = []
        for index, completion in enumerate(completions):
            answer = self._conversation.answer(self._model.format)
            answer.push(completion.text, last=True)
            choices.append(
                ChatChoice(
                    index=index,
                    message=answer.message(),
                    logprobs=self._logprobs(completion.logprobs),
                    finish_reason=answer.finish_reason(completion.finish_reason),
                )
            )
        return ChatResponse(id=self._id, created=self._created, model=self._model.name, choices=choices, usage=usage)

    async def stream(self, job: Job, *, usage: bool, always: bool) -> AsyncGenerator[str]:
        def chunk(index: int, delta: ChatDelta, **more: Any) -> str:
            choice = ChatChunkChoice(index=index, delta=delta, **more)
            return self._chunk(choice, usage=job.usage if always else None)

        answers = [self._conversation.answer(self._model.format) for _ in job.choices]
        contents = [TextEvent(chunk(index, ChatDelta(content=HOLE))) for index in range(len(answers))]
        for index in range(len(answers)):
            yield chunk(index, ChatDelta(role="assistant", content=""))
        async for index, piece in job.pieces():
            answer, logprobs = answers[index], self._logprobs(piece.logprobs)
            deltas = [_as_delta(delta) for delta in answer.push(piece.text, last=piece.finish_reason is not None)]
            for delta in deltas or ([ChatDelta(content="")] if logprobs else []):
                content = delta.content if delta.model_fields_set == {"content"} else None
                if content is None or logprobs or always:
                    yield chunk(index, delta, logprobs=logprobs)
                else:
                    yield contents[index].of(content)
                logprobs = None  # with the first of what a token adds
            if piece.finish_reason:
                yield chunk(index, ChatDelta(), finish_reason=answer.finish_reason(piece.finish_reason))
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
        return TopLogprob(token=self._model.text_of([token]), logprob=logprob, bytes=list(self._model.bytes_of(token)))


def _as_delta(delta: Delta) -> ChatDelta:
    match delta:
        case Content(text):
            return ChatDelta(content=text)
        case Reasoning(text):
            return ChatDelta(reasoning_content=text)
        case ToolCallStart(index, id, name):
            function = FunctionCall(name=name, arguments="")
            call = ToolCallDelta(index=index, id=id, type="function", function=function)
        case ToolCallArguments(index, text):
            call = ToolCallDelta(index=index, function=FunctionCall(arguments=text))
    return ChatDelta(tool_calls=[call])
