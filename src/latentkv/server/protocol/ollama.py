"""`/api/...`: Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.sampling import Strict, Temperature, TopP
from latentkv.server.settings import MAX_MESSAGES, MAX_STOP_CHARACTERS, MAX_STOPS
from latentkv.text.tools.specs import MAX_TOOLS

StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Options(Strict):
    """How tokens are chosen and when an answer ends."""

    foreign = foreign_names.OLLAMA_OPTIONS

    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=1, description="Ollama's name is num_predict; -1 and -2: as many as fit.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Ollama's name is repeat_penalty.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    num_ctx: int | None = Field(None, ge=1, description="Tokens of prompt and answer; what fits here is fixed.")


class OllamaRequest(Strict):
    """What both ways to ask have in common."""

    model: str = Field(max_length=1024, description="As /api/tags names it.")
    stream: bool = Field(True, description="Send the text as it comes, one line of JSON a piece.")
    options: Options | None = None
    format: str | dict[str, Any] | None = Field(None, description='"json", or a JSON schema.')
    think: bool | Literal["low", "medium", "high", "max"] | None = Field(None, description="Whether the model reasons.")


class OllamaChatRequest(OllamaRequest):
    """A conversation to answer; without messages nothing is done."""

    foreign = foreign_names.OLLAMA

    messages: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] = Field(
        default_factory=list[dict[str, Any]]
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """A prompt to answer, or, with `raw`, to continue; without one nothing is done."""

    foreign = foreign_names.OLLAMA_GENERATE

    prompt: str = ""
    system: str | None = None
    raw: bool = Field(False, description="Continue the prompt as it is, without the chat template.")


class ShowRequest(Strict):
    """Which model."""

    foreign = foreign_names.OLLAMA_SHOW

    model: str = Field(max_length=1024)


class OllamaFunction(BaseModel):
    """A function and its arguments."""

    name: str
    arguments: dict[str, Any]


class OllamaCall(BaseModel):
    """A call that the model makes."""

    id: str
    function: OllamaFunction


class OllamaMessage(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaPart(BaseModel):
    """What both kinds of answers have in common; durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChatPart(OllamaPart):
    """An answer, or what is new of it."""

    message: OllamaMessage


class OllamaGeneratePart(OllamaPart):
    """Likewise, to a prompt."""

    response: str
    thinking: str | None = None


class ModelDetails(BaseModel):
    """What kind of model it is."""

    parent_model: str = ""
    format: Literal["safetensors", "gguf"]
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str = ""
    details: ModelDetails


class OllamaModels(BaseModel):
    """All models: one."""

    models: list[OllamaModel]


class OllamaErrorResponse(BaseModel):
    """The body of every refusal."""

    error: str


class ShowResponse(BaseModel):
    """All about a model."""

    modelfile: str = ""
    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
