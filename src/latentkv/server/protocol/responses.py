"""`/v1/responses`: the newer of OpenAI's two ways to ask."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.reasoning import Effort, Verbosity
from latentkv.server.protocol.sampling import STRICT, StreamOptions, Strict, Temperature, TopP
from latentkv.server.settings import MAX_MESSAGES
from latentkv.text.tools.specs import MAX_TOOLS


class TextFormat(Strict):
    """What form the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=4096)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = Field(False, description=STRICT)


class TextOptions(Strict):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningOptions(Strict):
    """How a model reasons."""

    foreign = foreign_names.REASONING

    effort: Effort | None = None


class ResponsesRequest(Strict):
    """A question; nothing of it is stored."""

    foreign = foreign_names.RESPONSES

    model: str | None = Field(None, max_length=1024, description="As /v1/models names it; may be left out.")
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="A text, or items, oldest first: messages, calls, their outputs, reasoning."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1, description="New tokens at most; all that fit if left out.")
    temperature: Temperature = None
    top_p: TopP = None
    text: TextOptions | None = None
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="Of a stream.")
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="More of what there may be beside text; there is nothing else here."
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call; no others."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, or a function that must be called."
    )
    parallel_tool_calls: bool = Field(True, description="Whether one answer may make several calls.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] = Field(
        default_factory=dict[str, str], description="Is given back."
    )
    store: Literal[False] | None = Field(None, description="Nothing is stored here.")
    user: str | None = Field(None, max_length=256, description="Is written into the server's log.")


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """A part of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list[Any])


class OutputMessage(BaseModel):
    """Text of the answer."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningText(BaseModel):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """What the model thought before it answered."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[Any] = Field(default_factory=list[Any])
    content: list[ReasoningText]
    status: Status


class OutputCall(BaseModel):
    """A call that the model makes."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(BaseModel):
    """Of the tokens that were read."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """Of the tokens that were written."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer is cut short."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponsesResponse(BaseModel):
    """An answer and what it was asked with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float
    top_p: float
    parallel_tool_calls: bool = True
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    store: Literal[False] = False
    incomplete_details: IncompleteDetails | None = None
    error: None = None
    metadata: dict[str, str] = Field(default_factory=dict[str, str])
    usage: ResponsesUsage | None = None
