"""`/api/chat`, `/api/generate`, `/api/tags`, `/api/ps`, `/api/show`, `/api/version`: Ollama's API."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastapi import APIRouter

from latentkv.completion import Completion
from latentkv.engine import FinishReason, Request
from latentkv.models.parameters import checkpoint_dtype, count_parameters
from latentkv.server.answers import Answer
from latentkv.server.blocks import Blocks, Closed, Grown
from latentkv.server.bodies import BodyRoute
from latentkv.server.context import Context, InContext
from latentkv.server.conversation import as_chat_request, begin_conversation
from latentkv.server.errors import ollama_body, refusals
from latentkv.server.generation import Job
from latentkv.server.protocol.messages import as_object
from latentkv.server.protocol.ollama import (
    ModelDetails,
    OllamaCall,
    OllamaChatPart,
    OllamaChatRequest,
    OllamaErrorResponse,
    OllamaFunction,
    OllamaGeneratePart,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaModel,
    OllamaModels,
    OllamaPart,
    OllamaRequest,
    ShowRequest,
    ShowResponse,
)
from latentkv.server.protocol.ollama_chat import as_effort, as_messages, as_response_format, sampling
from latentkv.server.protocol.operations import VersionResponse
from latentkv.server.served import ServedModel
from latentkv.server.sse import EventStream
from latentkv.server.version import own_version

router = APIRouter(route_class=BodyRoute, responses=refusals(OllamaErrorResponse))

LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": {}}}}
"""For the schema of a route that can stream."""
TAG = ":latest"
"""Ollama's clients put it behind a name that has no tag."""

Part = TypeVar("Part", bound=OllamaPart)


@router.post("/api/chat", response_model=OllamaChatPart, responses=LINES, response_model_exclude_none=True)
async def chat(body: OllamaChatRequest, context: InContext) -> OllamaChatPart | EventStream:
    """Answer a conversation."""

    def part(text: str, thinking: str, calls: list[OllamaCall], **more: Any) -> OllamaChatPart:
        message = OllamaMessage(content=text, thinking=thinking or None, tool_calls=calls or None)
        return OllamaChatPart(message=message, **more)

    _begin(context, body)
    if not body.messages:
        return part("", "", [], **_loaded(context))
    conversation = await begin_conversation(
        context,
        as_chat_request(
            messages=as_messages(body.messages),
            tools=body.tools,
            reasoning_effort=as_effort(body),
            response_format=as_response_format(body.format),
            **sampling(body.options),
        ),
    )
    return await _answer(context, body, conversation.request, conversation.answer(context.model.format), part)


@router.post("/api/generate", response_model=OllamaGeneratePart, responses=LINES, response_model_exclude_none=True)
async def generate(body: OllamaGenerateRequest, context: InContext) -> OllamaGeneratePart | EventStream:
    """Answer a prompt, or continue it."""

    def part(text: str, thinking: str, _: list[OllamaCall], **more: Any) -> OllamaGeneratePart:
        return OllamaGeneratePart(response=text, thinking=thinking or None, **more)

    _begin(context, body)
    if not body.prompt:
        return part("", "", [], **_loaded(context))
    system = [{"role": "system", "content": body.system}] if body.system else []
    asked = as_chat_request(
        messages=[*system, {"role": "user", "content": body.prompt}],
        reasoning_effort=as_effort(body),
        response_format=as_response_format(body.format),
        **sampling(body.options),
    )
    if not body.raw:
        conversation = await begin_conversation(context, asked)
        return await _answer(context, body, conversation.request, conversation.answer(context.model.format), part)
    model = context.model
    params = asked.sampling(asked.max_tokens or model.capacity, asked.form(context.notes))
    request = await model.off_loop(lambda: model.llm.request(body.prompt, params), compiles=asked.has_form)
    return await _answer(context, body, request, None, part)


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags")
@router.get("/api/ps")
async def tags(context: InContext) -> OllamaModels:
    """The one model, under each of its names; it is always loaded."""
    served = context.model
    size = sum(file.stat().st_size for file in _weight_files(served))
    details, created = _details(served), _time(served.created)
    tagged = [name if ":" in name else name + TAG for name in served.names]
    return OllamaModels(
        models=[OllamaModel(name=name, model=name, modified_at=created, size=size, details=details) for name in tagged]
    )


@router.post("/api/show")
async def show(body: ShowRequest, context: InContext) -> ShowResponse:
    """What kind of model it is."""
    _require_model(context, body.model)
    served = context.model
    config, kind = served.llm.config, served.llm.config.model_type
    tools = served.require_tokenizer().takes_tools
    capabilities = {"completion": True, "tools": tools, "thinking": served.format.reasoning is not None}
    return ShowResponse(
        parameters="\n".join(f"{name} {value:g}" for name, value in served.llm.sampling_defaults.items()),
        template=served.template,
        details=_details(served),
        model_info={
            "general.architecture": kind,
            "general.parameter_count": count_parameters(config),
            f"{kind}.context_length": served.llm.max_context,
            f"{kind}.embedding_length": config.hidden_size,
            f"{kind}.block_count": config.num_layers,
        },
        capabilities=[name for name, there in capabilities.items() if there],
        modified_at=_time(served.created),
    )


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
async def version() -> VersionResponse:
    """Of this server."""
    return VersionResponse(version=own_version())


def _begin(context: Context, body: OllamaRequest) -> None:
    _require_model(context, body.model)
    asked, most = body.options.num_ctx if body.options else None, context.model.capacity
    if asked is not None and asked > most:
        context.notes.append(f"num_ctx is {most}")


def _require_model(context: Context, name: str) -> None:
    context.require_model(name if name in context.model.names else name.removesuffix(TAG))


async def _answer(
    context: Context, body: OllamaRequest, request: Request, answer: Answer | None, part: Callable[..., Part]
) -> Part | EventStream:
    """Run a request; `part` makes what is new of the answer. Without `answer` its text is taken as it is."""
    job = Job(context, [request], keep=context.model.format.markers if answer else ())
    writer = _Writer(context, job, answer, part)
    if body.stream:
        return EventStream(writer.stream(), job.close, done="", failed=_failed, media_type="application/x-ndjson")
    (completion,) = await job.completions()
    return writer.whole(completion)


def _failed(error: Exception) -> str:
    return json.dumps(ollama_body(error)) + "\n"


def _loaded(context: Context) -> dict[str, Any]:
    return {"model": context.model.name, "created_at": _time(time.time()), "done": True, "done_reason": "load"}


class _Writer(Generic[Part]):
    """Writes one answer, as a whole or as the lines of its growth."""

    def __init__(self, context: Context, job: Job, answer: Answer | None, part: Callable[..., Part]) -> None:
        self._model = context.model
        self._job = job
        self._answer = answer
        self._part = part
        self._blocks = Blocks()

    def whole(self, completion: Completion) -> Part:
        news = list(self._news(completion.text, last=True))
        text, thinking = "".join(text for text, _, _ in news), "".join(thinking for _, thinking, _ in news)
        return self._made(text, thinking, [call for _, _, calls in news for call in calls], completion.finish_reason)

    async def stream(self) -> AsyncGenerator[str]:
        async for _, piece in self._job.pieces():
            for text, thinking, calls in self._news(piece.text, last=piece.finish_reason is not None):
                yield self._line(self._made(text, thinking, calls))
            if piece.finish_reason:
                yield self._line(self._made("", "", [], piece.finish_reason))

    def _news(self, text: str, *, last: bool) -> Iterator[tuple[str, str, list[OllamaCall]]]:
        """(text, reasoning, calls) that are new; a call comes as a whole."""
        if self._answer is None:
            if text:
                yield text, "", []
            return
        for change in self._blocks.push(self._answer.push(text, last=last), last=last):
            match change:
                case Grown(block, new) if block.kind == "text":
                    yield new, "", []
                case Grown(block, new) if block.kind == "reasoning":
                    yield "", new, []
                case Closed(block) if block.kind == "call":
                    function = OllamaFunction(name=block.name, arguments=as_object(block.text))
                    yield "", "", [OllamaCall(id=block.call_id, function=function)]
                case _:
                    pass

    def _made(self, text: str, thinking: str, calls: list[OllamaCall], reason: FinishReason | None = None) -> Part:
        more = {} if reason is None else {"done_reason": reason, **self._counts()}
        created = _time(time.time())
        return self._part(
            text, thinking, calls, model=self._model.name, created_at=created, done=reason is not None, **more
        )

    def _line(self, part: OllamaPart) -> str:
        return part.model_dump_json(exclude_none=True) + "\n"

    def _counts(self) -> dict[str, int]:
        usage = self._job.usage
        total = time.monotonic() - self._job.arrived
        first = total if self._job.began is None else self._job.began - self._job.arrived
        seconds = {"total_duration": total, "load_duration": 0.0, "prompt_eval_duration": first,
                   "eval_duration": total - first}  # fmt: skip
        return {
            "prompt_eval_count": usage.prompt_tokens,
            "eval_count": usage.completion_tokens,
            **{name: round(value * 1e9) for name, value in seconds.items()},
        }


def _details(served: ServedModel) -> ModelDetails:
    config = served.llm.config
    return ModelDetails(
        format="gguf" if served.llm.folder.is_file() else "safetensors",
        family=config.model_type,
        families=[config.model_type],
        parameter_size=_short(count_parameters(config)),
        quantization_level=checkpoint_dtype(config).upper(),
    )


def _weight_files(served: ServedModel) -> list[Path]:
    folder = served.llm.folder
    return [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))


def _short(count: int) -> str:
    """30500000000 as 30.5B."""
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{sign}"
    return str(count)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
