"""`POST /v1/messages`, `POST /v1/messages/count_tokens`: Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter

from latentkv.completion import Completion
from latentkv.engine import FinishReason
from latentkv.server.blocks import Block, Blocks, Closed, Grown, Opened
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.conversation import Conversation, as_chat_request, begin_conversation
from latentkv.server.errors import anthropic_body, refusals
from latentkv.server.generation import Job
from latentkv.server.protocol.anthropic import (
    AnthropicErrorResponse,
    CountRequest,
    CountResponse,
    MessagesRequest,
    MessagesResponse,
    MessagesUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from latentkv.server.protocol.anthropic_chat import (
    as_chat_tools,
    as_effort,
    as_messages,
    as_response_format,
    as_tool_choice,
    goes_on,
)
from latentkv.server.protocol.chat import ChatRequest
from latentkv.server.protocol.messages import as_object
from latentkv.server.sse import STREAMS, EventStream

router = APIRouter(route_class=BodyRoute, responses=refusals(AnthropicErrorResponse))

_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking"),
           "call": ("input_json_delta", "partial_json")}  # fmt: skip


@router.post("/v1/messages", response_model=MessagesResponse, responses=STREAMS)
async def messages(body: MessagesRequest, context: InContext) -> MessagesResponse | EventStream:
    """Answer a conversation."""
    conversation = await begin_conversation(context, _as_chat(context, body, **_sampling(body)))
    job = Job(context, [conversation.request], keep=context.model.format.markers)
    writer = _Writer(context, body, job, conversation)
    if body.stream:
        return EventStream(writer.stream(), job.close, done="", failed=_failed)
    (completion,) = await job.completions()
    return writer.whole(completion)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, context: InContext) -> CountResponse:
    """Count the tokens of a conversation."""
    conversation = await begin_conversation(context, _as_chat(context, body))
    return CountResponse(input_tokens=len(conversation.request.prompt_token_ids))


def _as_chat(context: Context, body: CountRequest, **more: Any) -> ChatRequest:
    context.require_model(body.model)
    choice = as_tool_choice(body)
    alone = body.tool_choice is not None and body.tool_choice.get("disable_parallel_tool_use") is True
    return as_chat_request(
        model=body.model,
        messages=as_messages(body),
        tools=as_chat_tools(body),
        tool_choice=choice,
        parallel_tool_calls=not alone,
        reasoning_effort=as_effort(body, context.model.template, context.notes),
        response_format=as_response_format(body),
        continue_final_message=goes_on(body),
        **more,
    )


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    user = (body.metadata or {}).get("user_id")
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "user": str(user)[:256] if user is not None else None,
    }


def _failed(error: Exception) -> str:
    return _event("error", **anthropic_body(error))


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


class _Writer:
    """Writes one answer, as a whole or as the events of its growth."""

    def __init__(self, context: Context, body: MessagesRequest, job: Job, conversation: Conversation) -> None:
        self._model = context.model
        self._body = body
        self._job = job
        self._id = f"msg_{uuid4().hex}"
        self._answer = conversation.answer(context.model.format)
        self._blocks = Blocks()

    def whole(self, completion: Completion) -> MessagesResponse:
        for _ in self._blocks.push(self._answer.push(completion.text, last=True), last=True):
            pass
        return self._message(*self._end(completion.finish_reason, completion.stop_string))

    async def stream(self) -> AsyncGenerator[str]:
        yield _event("message_start", message=self._message(None, None).model_dump())
        reason: FinishReason | None = None
        stop: str | None = None
        async for _, piece in self._job.pieces():
            reason, stop = piece.finish_reason, piece.stop_string
            for event in self._push(piece.text, last=reason is not None):
                yield event
        if reason is not None:
            why, sequence = self._end(reason, stop)
            usage = self._usage().model_dump()
            yield _event("message_delta", delta={"stop_reason": why, "stop_sequence": sequence}, usage=usage)
        yield _event("message_stop")

    def _push(self, text: str, *, last: bool) -> Iterator[str]:
        for change in self._blocks.push(self._answer.push(text, last=last), last=last):
            place = {"index": change.block.index}
            match change:
                case Opened(block):
                    yield _event("content_block_start", **place, content_block=_as_block(block).model_dump())
                case Grown(block, new):
                    kind, name = _DELTAS[block.kind]
                    yield _event("content_block_delta", **place, delta={"type": kind, name: new})
                case Closed(block):
                    if block.kind == "reasoning":
                        signed = {"type": "signature_delta", "signature": ""}
                        yield _event("content_block_delta", **place, delta=signed)
                    yield _event("content_block_stop", **place)

    def _end(self, reason: FinishReason, stop: str | None) -> tuple[StopReason, str | None]:
        """Why the answer ended, and the stop sequence that ended it."""
        if reason == "length":
            return "max_tokens", None
        if stop in (self._body.stop_sequences or ()):
            return "stop_sequence", stop
        return ("tool_use" if self._answer.finish_reason(reason) == "tool_calls" else "end_turn"), None

    def _message(self, reason: StopReason | None, stop: str | None) -> MessagesResponse:
        return MessagesResponse(
            id=self._id,
            model=self._model.name,
            content=[_as_block(block) for block in self._blocks.all],
            stop_reason=reason,
            stop_sequence=stop,
            usage=self._usage(),
        )

    def _usage(self) -> MessagesUsage:
        usage = self._job.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )


def _as_block(block: Block) -> TextBlock | ThinkingBlock | ToolUseBlock:
    match block.kind:
        case "text":
            return TextBlock(text=block.text)
        case "reasoning":
            return ThinkingBlock(thinking=block.text)
        case "call":
            return ToolUseBlock(id=block.call_id, name=block.name, input=as_object(block.text))
