"""The parameters that all kinds of generation share."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentkv import structure
from latentkv.engine import SamplingParams, Structure
from latentkv.sampling_params import MAX_BIASES, MAX_CHOICES, MAX_SEED
from latentkv.server.errors import ApiError
from latentkv.server.protocol import foreign_names
from latentkv.server.protocol.foreign import Rules, translate
from latentkv.server.settings import MAX_STOP_CHARACTERS, MAX_STOPS
from latentkv.text.schema_strictness import read_schema

MAX_PARAMETERS = 64
MAX_BAD_WORDS = 256
FORMS = ("response_format", "structured_outputs", "bad_words")
"""Parameters that each give the text a form."""
OF_MODEL = "Left out: the model's default."
Temperature = Annotated[float | None, Field(ge=0, le=2, description=f"0 always takes the likeliest token. {OF_MODEL}")]
TopP = Annotated[
    float | None, Field(gt=0, le=1, description=f"Keep the likeliest tokens up to this probability. {OF_MODEL}")
]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Strict(BaseModel):
    """A part of a request: what it does not know it refuses by name, and it turns no type into another.

    Attributes:
        foreign: what becomes of the words that are not ours.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    foreign: ClassVar[Rules] = {}

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, given: object) -> object:
        """A parameter that is null is one that was left out."""
        if not isinstance(given, dict):
            return given
        found = cast("dict[str, Any]", given)
        if len(found) > MAX_PARAMETERS:
            raise ValueError(f"more than {MAX_PARAMETERS} parameters were given")
        return translate(found, {field.alias or name for name, field in cls.model_fields.items()}, cls.foreign)


STRICT = "Objects are closed, and what cannot be enforced is refused; else it is left out, and a header says so."


class StreamOptions(Strict):
    """How a stream is written; of an answer that is none they ask nothing."""

    foreign = foreign_names.STREAM_OPTIONS

    include_usage: bool = Field(False, description="End the stream with a chunk that counts all tokens.")
    continuous_usage_stats: bool = Field(False, description="Count the tokens so far in each chunk, too.")


class JsonSchema(Strict):
    """A named JSON schema."""

    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=4096)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(False, description=STRICT)


class ResponseFormat(Strict):
    """What form the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="The schema alone, as llama.cpp takes it.")


class StructuredOutputs(Strict):
    """A form beyond JSON, as vLLM names it: give one."""

    foreign = foreign_names.STRUCTURED_OUTPUTS

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=structure.MAX_CHOICES, fail_fast=True)] | None = None
    grammar: str | None = Field(None, description="In llguidance's dialect of Lark.")


class SamplingRequest(Strict):
    """How tokens are chosen and when a completion ends."""

    foreign = foreign_names.GENERATION

    model: str | None = Field(None, description="As /v1/models names it; may be left out.", max_length=1024)
    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=0, description=f"Keep this many likeliest tokens; 0 keeps all. {OF_MODEL}")
    min_p: float | None = Field(
        None, ge=0, le=1, description=f"Keep tokens at least this times as likely as the likeliest. {OF_MODEL}"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Completions of each prompt.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Strings that end the text; it is cut before them."
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        default_factory=list[int], description="Token ids that end the text, besides the model's own."
    )
    ignore_eos: bool = Field(False, description="Go on after the model's own end tokens.")
    min_tokens: int = Field(0, ge=0, description="New tokens before an end token may come.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="The same seed gives the same text; -1: a fresh one."
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Less likely what the text already holds.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Less likely, each time that the text holds it.")
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description=f"Above 1: less of prompt and text again. {OF_MODEL}"
    )
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="Is added to the logits of these token ids, -100 to 100."
    )
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] = Field(
        default_factory=list[str], description="Texts that must not occur in the answer."
    )
    response_format: ResponseFormat | None = Field(None, description="Hold the text to JSON.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Hold the text to another form.")
    stream: bool = Field(False, description="Send the text as it comes, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Of a stream.")
    cache_prompt: bool = Field(True, description="Whether what others have asked may be read from the cache.")
    cache_salt: str | None = Field(None, max_length=256, description="Prefixes are shared under the same one only.")
    user: str | None = Field(None, max_length=256, description="Is written into the server's log.")

    def sampling(self, max_tokens: int, structure: Structure | None, **more: Any) -> SamplingParams:
        """These parameters, and `more`, as the engine knows them; `structure` is what `form` gave, or another.

        Raises:
            ApiError: a token id of logit_bias is no number.
            RequestError: a value is out of range.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            n=self.n,
            stop=tuple(stop for stop in stops if stop),  # nothing ends at an empty one
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            seed=None if self.seed is None else self.seed & MAX_SEED,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias or {}),
            structure=structure,
        )
        return replace(params, **more)

    def form(self, notes: list[str]) -> Structure | None:
        """The form that the text must have; what of it is not enforced is added to `notes`.

        Raises:
            ApiError: two forms were given, or one without what it needs.
            RequestError: it is malformed or too large.
        """
        forms = [
            *_of_response_format(self.response_format, notes),
            *_of_structured_outputs(self.structured_outputs),
            *([Structure.without(self.bad_words)] if self.bad_words else ()),
        ]
        if len(forms) > 1:
            names = [name for name in FORMS if getattr(self, name)]
            raise ApiError(400, f"{' and '.join(names)}: give one form of the text.", param=names[-1])
        return forms[0] if forms else None

    @property
    def has_form(self) -> bool:
        """Whether the text must have a form, which is to be compiled."""
        return self.form_name is not None

    @property
    def form_name(self) -> str | None:
        """The parameter that asks for a form."""
        return next((name for name in FORMS if getattr(self, name)), None)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends by counting its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_as_it_goes(self) -> bool:
        """Whether each part of a stream counts the tokens so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def structure_of(schema: dict[str, Any], *, strict: bool, notes: list[str]) -> Structure:
    """A schema as a form; what of it is not enforced is added to `notes`."""
    read = read_schema(schema, strict=strict)
    notes += read.notes
    return Structure.json_schema(read.schema)


def _of_response_format(given: ResponseFormat | None, notes: list[str]) -> list[Structure]:
    match given:
        case ResponseFormat(json_schema=None, type="json_object" | "json_schema", schema_=dict() as schema):
            return [structure_of(schema, strict=False, notes=notes)]
        case ResponseFormat(schema_=dict()):
            raise ApiError(
                400,
                "response_format has a schema: put it into json_schema, with the type json_schema.",
                param="response_format",
            )
        case ResponseFormat(type="text" | "json_object", json_schema=JsonSchema()):
            raise ApiError(
                400, "response_format has a json_schema: its type must be json_schema.", param="response_format"
            )
        case ResponseFormat(type="json_object"):
            return [Structure.json_object()]
        case ResponseFormat(type="json_schema", json_schema=JsonSchema() as schema):
            return [structure_of(schema.schema_, strict=schema.strict, notes=notes)]
        case ResponseFormat(type="json_schema"):
            raise ApiError(400, "response_format of type json_schema needs json_schema.", param="response_format")
        case _:
            return []


def _of_structured_outputs(given: StructuredOutputs | None) -> list[Structure]:
    if given is None:
        return []
    forms: list[Structure] = []
    if given.json_ is not None:
        forms.append(Structure.json_schema(given.json_))
    if given.regex is not None:
        forms.append(Structure.regex(given.regex))
    if given.choice is not None:
        forms.append(Structure.choice(given.choice))
    if given.grammar is not None:
        forms.append(Structure.grammar(given.grammar))
    if not forms:
        raise ApiError(400, "structured_outputs needs json, regex, choice or grammar.", param="structured_outputs")
    return forms


def _biases(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ApiError(400, f"logit_bias: {token[:20]!r} is not a token id.", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


class PromptTokensDetails(BaseModel):
    """Of the tokens of prompts."""

    cached_tokens: int = Field(description="Known from earlier requests: they did not have to be read.")


class Usage(BaseModel):
    """Tokens of a request; a prompt counts once, however many completions it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        """The first two and their sum; `cached` tokens of the prompt were known."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )
