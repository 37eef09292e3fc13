"""`POST /v1/responses`, for text."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter

from latentkv.completion import Completion, Piece
from latentkv.engine import FinishReason, Request, SamplingParams, Structure
from latentkv.server.answers import Answer
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.protocol.reasoning import template_variables
from latentkv.server.protocol.responses import (
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
    TextFormat,
)
from latentkv.server.protocol.sampling import structure_of
from latentkv.server.sse import STREAMS, EventStream
from latentkv.text.tools import reasoning_is_open

router = APIRouter(route_class=BodyRoute)

_STATUS: dict[FinishReason | None, Literal["in_progress", "completed", "incomplete"]] = {
    None: "in_progress",
    "stop": "completed",
    "length": "incomplete",
}


@router.post("/v1/responses", response_model=ResponsesResponse, responses=STREAMS)
async def respond(body: ResponsesRequest, context: InContext) -> ResponsesResponse | EventStream:
    """Answer a text or a conversation."""
    context.require_model(body.model)
    context.note_user(body.user)
    request, reasoning_open = await context.model.off_loop(lambda: _read(context, body), compiles=body.text is not None)
    job = Job(context, [request], keep=context.model.format.markers)
    writer = _Writer(context, body, job, reasoning_open=reasoning_open)
    if body.stream:
        return EventStream(writer.stream(), job.close, done="")
    (completion,) = await job.completions()
    return writer.whole(completion)


def _read(context: Context, body: ResponsesRequest) -> tuple[Request, bool]:
    model = context.model
    if "message.output_text.logprobs" in (body.include or ()):
        raise ApiError(400, "include: log-probabilities come from /v1/chat/completions only.", param="include")
    variables = template_variables(
        body.reasoning.effort if body.reasoning else None,
        body.text.verbosity if body.text else None,
        model.template,
        reasons=model.format.reasoning is not None,
    )
    text = model.chat_text(_messages(body), **variables)
    reasoning_open = reasoning_is_open(text, model.format)
    prompt = model.llm.chat_tokens(text)
    params = SamplingParams(
        max_tokens=body.max_output_tokens or model.room_after(len(prompt)),
        temperature=body.temperature,
        top_p=body.top_p,
        structure=_structure(body.text.format if body.text else None, context.notes),
    )
    if params.structure and reasoning_open:
        raise ApiError(400, "text.format cannot be held to by a model that reasons first: leave it out.", param="text")
    return model.llm.request(prompt, model.llm.chat_params(params)), reasoning_open


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Input items as the messages of a chat."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        match item:
            case {"role": str(role), "content": content, **rest} if rest.get("type", "message") == "message":
                messages.append({"role": role, "content": content})
            case _:
                raise ApiError(400, f"input[{index}] is no message: give role and content.", param="input")
    return messages


def _structure(format: TextFormat | None, notes: list[str]) -> Structure | None:
    match format:
        case TextFormat(type="text" | "json_object", schema_=dict()):
            raise ApiError(400, "text.format: only its type json_schema takes a schema.", param="text")
        case TextFormat(type="json_object"):
            return Structure.json_object()
        case TextFormat(type="json_schema", schema_=dict() as schema):
            return structure_of(schema, strict=format.strict, notes=notes)
        case TextFormat(type="json_schema"):
            raise ApiError(400, "text.format of type json_schema needs a schema.", param="text")
        case _:
            return None


class _Writer:
    """Writes one answer, as a whole or as the events of its growth."""

    def __init__(self, context: Context, body: ResponsesRequest, job: Job, *, reasoning_open: bool) -> None:
        self._model = context.model
        self._body = body
        self._job = job
        self._choice = job.choices[0].params.choice
        self._id, self._message_id = f"resp_{uuid4().hex}", f"msg_{uuid4().hex}"
        self._created = int(time.time())
        self._answer = Answer(context.model.format, (), reasoning_open=reasoning_open, parallel=True)
        self._sequence = 0

    def whole(self, completion: Completion) -> ResponsesResponse:
        self._answer.push(completion.text, last=True)
        return self._response(completion.finish_reason)

    async def stream(self) -> AsyncGenerator[str]:
        started = self._response(None)
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        place = {"output_index": 0}
        part = {**place, "item_id": self._message_id, "content_index": 0}
        yield self._event("response.output_item.added", **place, item=self._message(None))
        yield self._event("response.content_part.added", **part, part=OutputText(text=""))
        reason: FinishReason | None = None
        async for _, piece in self._job.pieces():
            reason = piece.finish_reason
            for text in self._push(piece):
                yield self._event("response.output_text.delta", **part, delta=text, logprobs=[])
        message = self._message(reason)
        yield self._event("response.output_text.done", **part, text=message.content[0].text, logprobs=[])
        yield self._event("response.content_part.done", **part, part=message.content[0])
        yield self._event("response.output_item.done", **place, item=message)
        kind = "response.completed" if reason == "stop" else "response.incomplete"
        yield self._event(kind, response=self._response(reason))

    def _push(self, piece: Piece) -> list[str]:
        deltas = self._answer.push(piece.text, last=piece.finish_reason is not None)
        return [delta.content for delta in deltas if delta.content]

    def _event(self, kind: str, **fields: Any) -> str:
        shown = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in fields.items()}
        event = {"type": kind, "sequence_number": self._sequence, **shown}
        self._sequence += 1
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n"

    def _message(self, reason: FinishReason | None) -> OutputMessage:
        text = self._answer.message().content or ""
        return OutputMessage(id=self._message_id, status=_STATUS[reason], content=[OutputText(text=text)])

    def _response(self, reason: FinishReason | None) -> ResponsesResponse:
        body, usage = self._body, self._job.usage
        return ResponsesResponse(
            id=self._id,
            created_at=self._created,
            status=_STATUS[reason],
            model=self._model.name,
            output=[] if reason is None else [self._message(reason)],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=self._choice.temperature,
            top_p=self._choice.top_p,
            parallel_tool_calls=body.parallel_tool_calls,
            tool_choice=body.tool_choice,
            metadata=body.metadata,
            incomplete_details=IncompleteDetails() if reason == "length" else None,
            usage=None
            if reason is None
            else ResponsesUsage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        )
