"""`POST /v1/responses`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter

from latentkv.engine import FinishReason
from latentkv.server.blocks import Block, Blocks, Closed, Grown, Opened
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.conversation import Conversation, as_chat_request, begin_conversation
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.protocol.chat import ChatRequest
from latentkv.server.protocol.response_items import as_chat_tools, as_messages, as_response_format
from latentkv.server.protocol.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
    Status,
)
from latentkv.server.sse import STREAMS, EventStream

router = APIRouter(route_class=BodyRoute)

_STATUS: dict[FinishReason | None, Status] = {None: "in_progress", "stop": "completed", "length": "incomplete"}
_DELTAS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


@router.post("/v1/responses", response_model=ResponsesResponse, responses=STREAMS)
async def respond(body: ResponsesRequest, context: InContext) -> ResponsesResponse | EventStream:
    """Answer a text or a conversation."""
    conversation = await begin_conversation(context, _as_chat(body))
    job = Job(context, [conversation.request], keep=context.model.format.markers)
    writer = _Writer(context, body, job, conversation)
    if body.stream:
        return EventStream(writer.stream(), job.close, done="")
    (completion,) = await job.completions()
    return writer.whole(completion.text, completion.finish_reason)


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    if "message.output_text.logprobs" in (body.include or ()):
        raise ApiError(400, "include: log-probabilities come from /v1/chat/completions only.", param="include")
    return as_chat_request(
        model=body.model,
        messages=as_messages(body.instructions, body.input),
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        response_format=as_response_format(body.text.format if body.text else None),
        verbosity=body.text.verbosity if body.text else None,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        tools=as_chat_tools(body.tools),
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        user=body.user,
    )


class _Writer:
    """Writes one answer, as a whole or as the events of its growth."""

    def __init__(self, context: Context, body: ResponsesRequest, job: Job, conversation: Conversation) -> None:
        self._model = context.model
        self._body = body
        self._job = job
        self._choice = conversation.request.params.choice
        self._id = f"resp_{uuid4().hex}"
        self._created = int(time.time())
        self._answer = conversation.answer(context.model.format)
        self._blocks = Blocks()
        self._item_ids: dict[int, str] = {}
        self._sequence = 0

    def whole(self, text: str, reason: FinishReason) -> ResponsesResponse:
        for _ in self._blocks.push(self._answer.push(text, last=True), last=True):
            pass
        return self._response(reason)

    async def stream(self) -> AsyncGenerator[str]:
        started = self._response(None)
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        reason: FinishReason | None = None
        async for _, piece in self._job.pieces():
            reason = piece.finish_reason
            for event in self._push(piece.text, reason):
                yield event
        kind = "response.completed" if reason == "stop" else "response.incomplete"
        yield self._event(kind, response=self._response(reason))

    def _push(self, text: str, reason: FinishReason | None) -> Iterator[str]:
        last = reason is not None
        for change in self._blocks.push(self._answer.push(text, last=last), last=last):
            block = change.block
            place = {"output_index": block.index}
            item = {**place, "item_id": self._item_id(block)}
            part = item if block.kind == "call" else {**item, "content_index": 0}
            probs = {"logprobs": list[Any]()} if block.kind == "text" else {}
            kind = _DELTAS[block.kind]
            match change:
                case Opened():
                    yield self._event("response.output_item.added", **place, item=self._item(block, None, bare=True))
                    if block.kind == "text":
                        yield self._event("response.content_part.added", **part, part=OutputText(text=""))
                case Grown(_, new):
                    yield self._event(f"{kind}.delta", **part, delta=new, **probs)
                case Closed(_, ends_all):
                    is_call = block.kind == "call"
                    whole = {"arguments": block.text, "name": block.name} if is_call else {"text": block.text}
                    yield self._event(f"{kind}.done", **part, **whole, **probs)
                    if block.kind == "text":
                        yield self._event("response.content_part.done", **part, part=OutputText(text=block.text))
                    item_done = self._item(block, reason if ends_all else "stop")
                    yield self._event("response.output_item.done", **place, item=item_done)

    def _event(self, kind: str, **fields: Any) -> str:
        shown = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in fields.items()}
        event = {"type": kind, "sequence_number": self._sequence, **shown}
        self._sequence += 1
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n"

    def _item_id(self, block: Block) -> str:
        return self._item_ids.setdefault(block.index, f"{_PREFIXES[block.kind]}_{uuid4().hex}")

    def _item(self, block: Block, reason: FinishReason | None, *, bare: bool = False) -> OutputItem:
        """A block as an item; `bare` is one that has just begun."""
        own_id, status = self._item_id(block), _STATUS[reason]
        match block.kind:
            case "text":
                content = [] if bare else [OutputText(text=block.text)]
                return OutputMessage(id=own_id, status=status, content=content)
            case "reasoning":
                thought = [] if bare else [ReasoningText(text=block.text)]
                return OutputReasoning(id=own_id, status=status, content=thought)
            case "call":
                return OutputCall(
                    id=own_id, call_id=block.call_id, name=block.name, arguments=block.text, status=status
                )

    def _response(self, reason: FinishReason | None) -> ResponsesResponse:
        body, blocks = self._body, self._blocks.all
        return ResponsesResponse(
            id=self._id,
            created_at=self._created,
            status=_STATUS[reason],
            model=self._model.name,
            output=[self._item(each, reason if each is blocks[-1] else "stop") for each in blocks if reason],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=self._choice.temperature,
            top_p=self._choice.top_p,
            parallel_tool_calls=body.parallel_tool_calls,
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            metadata=body.metadata,
            incomplete_details=IncompleteDetails() if reason == "length" else None,
            usage=None if reason is None else self._usage(),
        )

    def _usage(self) -> ResponsesUsage:
        usage, tokenizer = self._job.usage, self._model.require_tokenizer()
        thought = "".join(block.text for block in self._blocks.all if block.kind == "reasoning")
        thinking = len(tokenizer.encode(thought, add_bos=False)) if thought else 0
        return ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=min(thinking, usage.completion_tokens)),
            total_tokens=usage.total_tokens,
        )
