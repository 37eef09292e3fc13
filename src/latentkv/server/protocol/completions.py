"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from latentkv.sampling_params import MAX_CHOICES
from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.sampling import SamplingRequest, Usage
from latentkv.server.settings import MAX_PROMPTS, MAX_TOP_LOGPROBS

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(SamplingRequest):
    """Prompts to continue."""

    foreign = foreign_names.COMPLETIONS

    prompt: str | Texts | TokenIds | TokenLists = Field(description="A text or token ids, or several of either.")
    max_tokens: int = Field(16, ge=-1, description="New tokens at most; -1: all that fit, 0 only with echo.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Make so many, return the n likeliest a token.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Also so many likeliest tokens of each.")
    echo: bool = Field(False, description="Put the prompt before the text; with logprobs, those of its tokens too.")
    add_special_tokens: bool = Field(True, description="Put the begin token before a text where the model has one.")


class CompletionLogprobs(BaseModel):
    """Four lists with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionResponse(BaseModel):
    """All completions; in a stream, a part of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
