"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.reasoning import Effort, Verbosity
from latentkv.server.protocol.sampling import SamplingRequest, Usage
from latentkv.server.settings import MAX_MESSAGES, MAX_TOP_LOGPROBS
from latentkv.text.tools.specs import MAX_TOOLS


class ChatRequest(SamplingRequest):
    """A conversation to answer."""

    foreign = foreign_names.CHAT

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="Oldest first: role and content, which is text or a list of text parts."
    )
    max_tokens: int | None = Field(None, ge=1, description="New tokens at most; all that fit if left out.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="And of so many likeliest; logprobs.")
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, or a function that must be called."
    )
    parallel_tool_calls: bool = Field(True, description="Whether one answer may make several calls.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="Variables of the checkpoint's template, like enable_thinking."
    )
    reasoning_effort: Effort | None = Field(None, description="Of a model that reasons; none turns it off.")
    verbosity: Verbosity | None = Field(None, description="Of a model whose template knows it.")
    add_generation_prompt: bool | None = Field(None, description="End with the opening of an answer; left out: yes.")
    continue_final_message: bool = Field(False, description="Go on with the last message instead of a new one.")
    add_special_tokens: bool = Field(False, description="Put the begin token before what the template writes.")
    documents: list[dict[str, Any]] | None = Field(None, description="Of a model whose template takes them.")


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A chosen token and the likeliest."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """A function's name and its arguments as JSON text; in a stream, what is new of them."""

    name: str | None = None
    arguments: str


class ToolCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatResponse(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(BaseModel):
    """What is new of a call: its id and name come first, then its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatDelta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """Of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A part of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
