"""`/v1/messages`: Anthropic's API, as coding agents speak it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.sampling import Strict, Temperature, TopP
from latentkv.server.settings import MAX_MESSAGES, MAX_STOP_CHARACTERS, MAX_STOPS
from latentkv.text.tools.specs import MAX_TOOLS

Blocks = str | list[dict[str, Any]]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class CountRequest(Strict):
    """A conversation whose tokens are counted."""

    foreign = foreign_names.ANTHROPIC

    model: str = Field(max_length=1024, description="As /v1/models names it.")
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="Oldest first: role and content, which is text or a list of blocks."
    )
    system: Blocks | None = Field(None, description="Instructions before the messages.")
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Tools that the client runs; no others."
    )
    tool_choice: dict[str, Any] | None = Field(None, description="auto, any, none, or a tool that must be called.")
    thinking: dict[str, Any] | None = Field(None, description="Of a model whose reasoning can be turned on and off.")
    output_config: dict[str, Any] | None = Field(None, description="effort, and the form of the text.")


class MessagesRequest(CountRequest):
    """A conversation to answer."""

    max_tokens: int = Field(ge=1, description="New tokens at most.")
    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=0)
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    metadata: dict[str, Any] | None = Field(None, description="Its user_id is written into the server's log.")


class TextBlock(BaseModel):
    """Text."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingBlock(BaseModel):
    """What the model thought."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""  # nothing is signed here


class ToolUseBlock(BaseModel):
    """A call that the model makes."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(BaseModel):
    """Tokens; those that were known of the prompt are not among input_tokens."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessagesResponse(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None = None
    usage: MessagesUsage


class AnthropicErrorDetail(BaseModel):
    """What is wrong, in which words."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every refusal."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class CountResponse(BaseModel):
    """Tokens that a conversation has as the model reads it."""

    input_tokens: int
