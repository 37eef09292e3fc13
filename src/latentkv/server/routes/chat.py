"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.responses import Response

from latentkv.completion import Completion
from latentkv.engine import Request, Structure, TokenLogprobs
from latentkv.server.answers import Answer
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    TokenLogprob,
    TopLogprob,
)
from latentkv.server.protocol.messages import goes_on
from latentkv.server.protocol.reasoning import template_variables
from latentkv.server.protocol.sampling import Usage
from latentkv.server.sse import HOLE, STREAMS, EventStream, TextEvent, data
from latentkv.text.tools import Tool, call_grammar, read_tool_choice, read_tools, reasoning_is_open

router = APIRouter(route_class=BodyRoute)

RESERVED = {"self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""What a template is given from elsewhere."""


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAMS)
async def chat(body: ChatRequest, context: InContext) -> Response:
    """Answer a conversation."""
    context.require_model(body.model)
    context.note_user(body.user)
    context.part_prefixes(body.cache_salt, cached=body.cache_prompt)
    compiles = body.has_form or bool(body.tools)
    conversation = await context.model.off_loop(lambda: _read(context, body), compiles=compiles)
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


@dataclass(frozen=True)
class _Conversation:
    """What was asked.

    Attributes:
        request: for the engine.
        tools: that may be called.
        reasoning_open: whether the prompt ends inside of reasoning.
        parallel: whether an answer may make several calls.
    """

    request: Request
    tools: tuple[Tool, ...]
    reasoning_open: bool
    parallel: bool


def _read(context: Context, body: ChatRequest) -> _Conversation:
    """Everything that takes long: the template, the tokens, the grammar."""
    model = context.model
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true: set it, or leave it out.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
    reserved = RESERVED & body.chat_template_kwargs.keys()
    if reserved:
        name = min(reserved)
        raise ApiError(400, f"chat_template_kwargs may not set {name}: leave it out.", param="chat_template_kwargs")
    if body.documents and "documents" not in model.template:
        raise ApiError(
            400, "documents: this model's chat template takes none; put them into a message.", param="documents"
        )
    continues = body.continue_final_message or goes_on(body.messages)
    if continues and body.add_generation_prompt:
        raise ApiError(
            400, "add_generation_prompt and continue_final_message exclude each other: give one of them.",
            param="continue_final_message",
        )  # fmt: skip
    tools = read_tools(body.tools)
    choice = read_tool_choice(body.tool_choice, tools)
    given_tools = choice.offered(body.tools or ())
    tools = tuple(tool for tool in tools if choice.allows(tool.name))
    if tools and body.bad_words:
        raise ApiError(400, "bad_words and tools exclude each other: give one of them.", param="bad_words")
    variables = {
        **template_variables(
            body.reasoning_effort, body.verbosity, model.template, reasons=model.format.reasoning is not None
        ),
        **body.chat_template_kwargs,
        **({"tools": given_tools} if tools else {}),
        **({"documents": body.documents} if body.documents else {}),
    }
    text = model.chat_text(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=continues,
        **variables,
    )
    reasoning_open = reasoning_is_open(text, model.format)
    prompt = model.llm.chat_tokens(text, add_bos=body.add_special_tokens)
    structure = body.form(context.notes)
    if structure and reasoning_open:
        raise ApiError(
            400,
            f"{body.form_name} cannot be held to while the model reasons: turn its reasoning off, with most templates "
            'by chat_template_kwargs={"enable_thinking": false}.',
            param=body.form_name,
        )
    grammar = call_grammar(
        model.format,
        tools,
        choice,
        special=model.special_markers,
        reasoning_open=reasoning_open,
        parallel=body.parallel_tool_calls,
    )
    if grammar and structure:
        raise ApiError(400, "tool_choice and response_format ask for different forms: give one.", param="tool_choice")
    params = body.sampling(
        body.max_completion_tokens or body.max_tokens or model.room_after(len(prompt)),
        Structure.grammar(grammar) if grammar else structure,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    request = model.llm.request(prompt, model.llm.chat_params(params))
    return _Conversation(
        request, () if choice.mode == "none" else tools, reasoning_open, parallel=body.parallel_tool_calls
    )


class _Writer:
    """Writes answers."""

    def __init__(self, context: Context, conversation: _Conversation, choices: int) -> None:
        self._model = context.model
        self._conversation = conversation
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())

    def whole(self, completions: list[Completion], usage: Usage) -> ChatResponse:
        choices: list[ChatChoice] = []
        for index, completion in enumerate(completions):
            answer = self._answer()
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

        answers = [self._answer() for _ in job.choices]
        contents = [TextEvent(chunk(index, ChatDelta(content=HOLE))) for index in range(len(answers))]
        for index in range(len(answers)):
            yield chunk(index, ChatDelta(role="assistant", content=""))
        async for index, piece in job.pieces():
            answer, logprobs = answers[index], self._logprobs(piece.logprobs)
            deltas = answer.push(piece.text, last=piece.finish_reason is not None)
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

    def _answer(self) -> Answer:
        asked = self._conversation
        return Answer(self._model.format, asked.tools, reasoning_open=asked.reasoning_open, parallel=asked.parallel)

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
