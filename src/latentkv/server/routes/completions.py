"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from uuid import uuid4

from fastapi import APIRouter

from latentkv.completion import Completion, Piece
from latentkv.engine import Request, SamplingParams, Structure, TokenLogprobs
from latentkv.server.bodies import TokensRoute
from latentkv.server.context import Context, InContext
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.offsets import TextOffsets
from latentkv.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from latentkv.server.protocol.foreign_names import AS_MANY_AS_FIT
from latentkv.server.served import ServedModel
from latentkv.server.sse import HOLE, STREAMS, EventStream, TextEvent, data

router = APIRouter(route_class=TokensRoute)


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAMS, response_model_exclude_none=True)
async def complete(body: CompletionRequest, context: InContext) -> CompletionResponse | EventStream:
    """Continue one prompt or several."""
    context.require_model(body.model)
    context.note_user(body.user)
    context.part_prefixes(body.cache_salt, cached=body.cache_prompt)
    prompts = await context.model.off_loop(lambda: _requests(context, body), compiles=body.has_form)
    job = Job(context, prompts)
    writer = _Writer(context, body, prompts)
    if body.stream:
        return EventStream(writer.stream(job), job.close)
    return writer.whole(await job.completions(), job)


class _Writer:
    """Writes choices, the prompt before them where it was asked for."""

    def __init__(self, context: Context, body: CompletionRequest, prompts: list[Request]) -> None:
        self._model = context.model
        self._body = body
        self._n = body.n
        self._id, self._created = f"cmpl-{uuid4().hex}", int(time.time())
        self._echoes = [
            given if isinstance(given, str) else self._text(given) for given in (_prompts(body) if body.echo else ())
        ]
        self._offsets = [self._offsets_of(index, prompt) for index, prompt in enumerate(prompts) for _ in range(body.n)]

    def whole(self, completions: list[Completion], job: Job) -> CompletionResponse:
        choices = [
            self._choice(
                index,
                Piece(
                    completion.text,
                    completion.token_ids,
                    completion.logprobs,
                    completion.prompt_logprobs,
                    completion.finish_reason,
                ),
                completion.prompt_token_ids,
            )
            for index, completion in enumerate(completions)
        ]
        return self._response(choices, job, usage=True)

    async def stream(self, job: Job) -> AsyncGenerator[str]:
        text_alone: dict[int, TextEvent] = {}  # by choice, from its second event on
        says_more = self._body.counts_as_it_goes or self._body.max_tokens == 0
        async for index, piece in job.pieces():
            alone = text_alone.get(index)
            if alone and not (piece.logprobs or piece.finish_reason or says_more):
                if piece.text:
                    yield alone.of(piece.text)
                continue
            prompt = () if alone else job.choices[index].prompt_token_ids
            text_alone[index] = alone or TextEvent(self._event(CompletionChoice(index=index, text=HOLE), job))
            if piece.text or prompt or piece.logprobs or piece.finish_reason:
                yield self._event(self._choice(index, piece, prompt), job)
        if self._body.includes_usage:
            yield data(self._response([], job, usage=True))

    def _event(self, choice: CompletionChoice, job: Job) -> str:
        return data(self._response([choice], job, usage=self._body.counts_as_it_goes))

    def _choice(self, index: int, piece: Piece, prompt: Sequence[int]) -> CompletionChoice:
        """What is new of a choice; `prompt` is given with its first part."""
        nothing_asked = self._body.max_tokens == 0
        text = "" if nothing_asked else piece.text
        entries: list[tuple[int, TokenLogprobs | None]] = []
        offsets: list[int] = []
        if self._body.echo and prompt:
            text = self._echoes[index // self._n] + text
            if self._body.logprobs is not None:
                entries += zip(prompt, [None, *(piece.prompt_logprobs or ())], strict=True)
                offsets += self._offsets[index].of_prompt()
        if not nothing_asked:
            entries += [(entry.token_id, entry) for entry in piece.logprobs or ()]
            offsets += [self._offsets[index].of_next(entry.token_id) for entry in piece.logprobs or ()]
        logprobs = None if self._body.logprobs is None else self._logprobs(entries, offsets)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=piece.finish_reason)

    def _offsets_of(self, index: int, prompt: Request) -> TextOffsets:
        echo = self._echoes[index] if self._body.echo else ""
        shows_special = not isinstance(_prompts(self._body)[index], str)
        return TextOffsets(self._model.llm.tokenizer, prompt.prompt_token_ids, echo, shows_special=shows_special)

    def _logprobs(self, entries: list[tuple[int, TokenLogprobs | None]], offsets: list[int]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._text([token]) for token, _ in entries],
            token_logprobs=[entry.logprob if entry else None for _, entry in entries],
            top_logprobs=[
                {self._text([token]): value for token, value in entry.top.items()} if entry else None
                for _, entry in entries
            ],
            text_offset=offsets,
        )

    def _response(self, choices: list[CompletionChoice], job: Job, *, usage: bool = False) -> CompletionResponse:
        counted = job.usage if usage else None
        if counted and self._body.max_tokens == 0:
            counted = counted.of(counted.prompt_tokens, 0, counted.prompt_tokens_details.cached_tokens)
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model.name, choices=choices, usage=counted
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._model.text_of(tokens)


def _params(body: CompletionRequest, capacity: int, structure: Structure | None) -> SamplingParams:
    if body.stream and (body.best_of or body.n) > body.n:
        raise ApiError(400, "best_of cannot be streamed: which is best is known at the end.", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens=0 asks for nothing: ask for a token, or for the prompt by echo.", param="max_tokens"
        )
    return body.sampling(
        capacity if body.max_tokens == AS_MANY_AS_FIT else max(body.max_tokens, 1),
        structure,
        best_of=body.best_of,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _requests(context: Context, body: CompletionRequest) -> list[Request]:
    """Everything that takes long: the grammar, the tokens."""
    model = context.model
    params = _params(body, model.capacity, body.form(context.notes))
    return [_request(model, prompt, params, body) for prompt in _prompts(body)]


def _request(model: ServedModel, prompt: str | list[int], params: SamplingParams, body: CompletionRequest) -> Request:
    """One prompt, its text turned into tokens."""
    if isinstance(prompt, str) and not body.add_special_tokens and model.require_tokenizer().adds_bos:
        prompt = list(model.llm.request(prompt).prompt_token_ids[1:])
    request = model.llm.request(prompt, params)
    if body.max_tokens != AS_MANY_AS_FIT:
        return request
    room = model.room_after(len(request.prompt_token_ids))
    return replace(request, params=replace(params, max_tokens=room), max_new_tokens=room)


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    match body.prompt:
        case str():
            return [body.prompt]
        case [int(), *_]:
            return [body.prompt]  # pyright: ignore[reportReturnType] of the four kinds it is token ids
        case _:
            return body.prompt  # pyright: ignore[reportReturnType]
