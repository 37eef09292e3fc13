"""Models, tokens and the state of the server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentkv.server.protocol.sampling import Strict
from latentkv.server.settings import MAX_MESSAGES


class ErrorDetail(BaseModel):
    """What is wrong, with what, in which words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A model, as OpenAI's clients and Anthropic's know it."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    owned_by: str = "latentkv"
    max_model_len: int = Field(description="Tokens of a prompt and its completion together.")
    max_input_tokens: int


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: Literal[False] = False


class TokenizeRequest(Strict):
    """A text or a conversation."""

    model: str | None = Field(None, max_length=1024)
    prompt: str | None = Field(None, description="A text; or give messages.")
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put the begin token before it; of a text, left out: yes; of a conversation: no."
    )
    add_generation_prompt: bool | None = Field(None, description="End with the opening of an answer; left out: yes.")
    continue_final_message: bool = Field(False, description="End amid the last message, which is to be gone on with.")
    return_token_strs: bool = Field(False, description="Also each token's text.")


class TokenizeResponse(BaseModel):
    """Its tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = Field(None, max_length=1024)
    tokens: Annotated[list[int], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    """Their text."""

    prompt: str


class HealthResponse(BaseModel):
    """How the engine does."""

    status: Literal["loading", "idle", "working", "late", "draining", "stopped", "dead"]
    reason: str = ""


class VersionResponse(BaseModel):
    """Which release it is."""

    version: str


class RequestCounts(BaseModel):
    """Requests by state."""

    running: int
    waiting: int
    finished: int


class Throughput(BaseModel):
    """Tokens a second over the last seconds."""

    generated_tokens_per_s: float
    prompt_tokens_per_s: float


class CacheState(BaseModel):
    """The latent cache, beside what multi-head attention would have stored."""

    format: str
    used_tokens: int = Field(description="Room of the pages that requests hold.")
    capacity_tokens: int
    used_bytes: int
    capacity_bytes: int
    kept_bytes: int = Field(description="Of free pages whose prefixes can still be found.")
    mha_bytes: int = Field(description="Of used_tokens as keys and values of multi-head attention in bf16.")
    mha_ratio: float = Field(description="Bytes of a token with multi-head attention, over those in this cache.")


class StatsResponse(BaseModel):
    """What the page shows."""

    model: str
    version: str
    uptime_s: float
    context: int
    sampling_defaults: dict[str, float] = Field(description="Of requests, as the checkpoint recommends them.")
    chat_template: bool = Field(description="Whether the model has one; conversations are written as a script without.")
    requests: RequestCounts
    throughput: Throughput
    cache: CacheState
