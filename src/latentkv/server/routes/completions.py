"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from uuid import uuid4

from fastapi import APIRouter

from latentkv.completion import Completion, Piece
from latentkv.engine import Request, SamplingParams, TokenLogprobs
from latentkv.server.bodies import TokensRoute
from latentkv.server.context import Context, InContext
from latentkv.server.errors import ApiError
from latentkv.server.generation import Job
from latentkv.server.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from latentkv.server.sse import STREAMS, EventStream, data

router = APIRouter(route_class=TokensRoute)


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAMS, response_model_exclude_none=True)
async def complete(body: CompletionRequest, context: InContext) -> CompletionResponse | EventStream:
    """Continue one prompt or several."""
    context.require_model(body.model)
    context.note_user(body.user)
    params = _params(body)
    prompts = await context.model.off_loop(
        lambda: [context.model.llm.request(prompt, params) for prompt in _prompts(body)],
        compiles=params.structure is not None,
    )
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
        self._offsets = [0] * (len(prompts) * body.n)

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
        begun: set[int] = set()
        async for index, piece in job.pieces():
            prompt = () if index in begun else job.choices[index].prompt_token_ids
            begun.add(index)
            if piece.text or prompt or piece.logprobs or piece.finish_reason:
                yield data(self._response([self._choice(index, piece, prompt)], job))
        if self._body.includes_usage:
            yield data(self._response([], job, usage=True))

    def _choice(self, index: int, piece: Piece, prompt: Sequence[int]) -> CompletionChoice:
        """What is new of a choice; `prompt` is given with its first part."""
        nothing_asked = self._body.max_tokens == 0
        text = "" if nothing_asked else piece.text
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if self._body.echo and prompt:
            text = self._echoes[index // self._n] + text
            scores = piece.prompt_logprobs or []
            entries += zip(prompt, [None, *scores], strict=True) if self._body.logprobs is not None else []
        if not nothing_asked:
            entries += [(entry.token_id, entry) for entry in piece.logprobs or ()]
        logprobs = None if self._body.logprobs is None else self._logprobs(index, entries)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=piece.finish_reason)

    def _logprobs(self, index: int, entries: list[tuple[int, TokenLogprobs | None]]) -> CompletionLogprobs:
        tokens = [self._text([token]) for token, _ in entries]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return CompletionLogprobs(
            tokens=tokens,
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
            counted = counted.of(counted.prompt_tokens, 0)
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model.name, choices=choices, usage=counted
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._model.text_of(tokens)


def _params(body: CompletionRequest) -> SamplingParams:
    if body.stream and (body.best_of or body.n) > body.n:
        raise ApiError(400, "best_of cannot be streamed: which is best is known at the end.", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens=0 asks for nothing: ask for a token, or for the prompt by echo.", param="max_tokens"
        )
    return body.sampling(
        max(body.max_tokens, 1),
        best_of=body.best_of,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    match body.prompt:
        case str():
            return [body.prompt]
        case [int(), *_]:
            return [body.prompt]  # pyright: ignore[reportReturnType] of the four kinds it is token ids
        case _:
            return body.prompt  # pyright: ignore[reportReturnType]
