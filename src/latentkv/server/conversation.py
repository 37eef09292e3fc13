"""A conversation as it was asked, made into what the engine runs; the same for every API that has conversations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from latentkv.engine import Request, Structure
from latentkv.server.answers import Answer
from latentkv.server.context import Context
from latentkv.server.errors import ApiError
from latentkv.server.protocol.chat import ChatRequest
from latentkv.server.protocol.messages import goes_on
from latentkv.server.protocol.reasoning import template_variables
from latentkv.text.schema_strictness import read_schema
from latentkv.text.tools import (
    OutputFormat,
    Tool,
    call_grammar,
    json_after_reasoning,
    read_tool_choice,
    read_tools,
    reasoning_is_open,
)

RESERVED = {"self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""What a template is given from elsewhere."""


@dataclass(frozen=True)
class Conversation:
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

    def answer(self, format: OutputFormat) -> Answer:
        """A reader of one answer to it, from a model that writes in `format`."""
        return Answer(format, self.tools, reasoning_open=self.reasoning_open, parallel=self.parallel)


async def begin_conversation(context: Context, body: ChatRequest) -> Conversation:
    """What is asked of this server's model, beside the event loop.

    Raises:
        ApiError: a part of it cannot be; the message names it.
        LatentKVError: likewise.
    """
    context.require_model(body.model)
    context.note_user(body.user)
    context.part_prefixes(body.cache_salt, cached=body.cache_prompt)
    return await context.model.off_loop(lambda: _read(context, body), compiles=body.has_form or bool(body.tools))


def as_chat_request(**given: Any) -> ChatRequest:
    """What another API asks, as a chat's; None counts as left out.

    Raises:
        RequestValidationError: as from a body that is malformed.
        ApiError: likewise.
    """
    try:
        return ChatRequest.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _read(context: Context, body: ChatRequest) -> Conversation:
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
            body.reasoning_effort,
            body.verbosity,
            model.template,
            reasons=model.format.reasoning is not None,
            notes=context.notes,
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
    if structure and reasoning_open and model.format.reasoning:
        if structure.kind != "json_schema":
            raise ApiError(
                400,
                f"{body.form_name} cannot be held to while the model reasons, unless it is JSON: turn its reasoning "
                'off, with most templates by reasoning_effort "none".',
                param=body.form_name,
            )
        source, special = structure.source, model.special_markers
        structure = Structure.grammar(json_after_reasoning(model.format.reasoning, source, special=special))
    forced = [_enforceable(tool, context.notes) for tool in tools] if choice.mode == "required" else tools
    grammar = call_grammar(
        model.format,
        forced,
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
    return Conversation(
        request, () if choice.mode == "none" else tools, reasoning_open, parallel=body.parallel_tool_calls
    )


def _enforceable(tool: Tool, notes: list[str]) -> Tool:
    """A tool whose arguments can be held to its schema; what cannot is added to `notes`."""
    read = read_schema(tool.parameters, strict=False)
    notes += [f"{tool.name}: {note}" for note in read.notes]
    return replace(tool, parameters=read.schema)
