"""Models, tokens, and how the server does."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from latentkv.plan import mha_bytes
from latentkv.server.bodies import TokensRoute
from latentkv.server.context import InContext
from latentkv.server.errors import ApiError
from latentkv.server.protocol.messages import goes_on
from latentkv.server.protocol.operations import (
    CacheState,
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    RequestCounts,
    StatsResponse,
    Throughput,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)
from latentkv.server.version import own_version

router = APIRouter(route_class=TokensRoute)


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"model": HealthResponse, "description": "The engine does not serve."}})
async def health(context: InContext, response: Response) -> HealthResponse:
    """Whether new requests can be served; needs no key."""
    found = context.model.thread.health()
    response.status_code = 200 if found.ok else 503
    return HealthResponse(status=found.state, reason=found.reason)


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version() -> VersionResponse:
    """Of this server."""
    return VersionResponse(version=own_version())


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(context: InContext) -> Response:
    """For Prometheus."""
    return Response(context.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def models(context: InContext) -> ModelList:
    """The one model, under each of its names."""
    cards = [_card(context, name) for name in context.model.names]
    return ModelList(data=cards, first_id=cards[0].id, last_id=cards[-1].id)


@router.head("/v1/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}")
async def model(name: Annotated[str, Path(max_length=1024)], context: InContext) -> ModelCard:
    """The one model, by name."""
    context.require_model(name)
    return _card(context, name)


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, context: InContext) -> TokenizeResponse:
    """A text or a conversation as token ids."""
    context.require_model(body.model)
    served = context.model
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt or messages: give one of them.", param="prompt")
    tokenizer = served.require_tokenizer()

    def encoded() -> tuple[list[int], list[str] | None]:
        if body.messages is not None:
            text = served.chat_text(
                body.messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final_message=body.continue_final_message or goes_on(body.messages),
            )
            tokens = served.llm.chat_tokens(text, add_bos=body.add_special_tokens is True)
        else:
            served.llm.require_not_too_long(len(body.prompt or ""))
            bare = body.add_special_tokens is False
            tokens = tokenizer.encode(body.prompt or "", add_bos=tokenizer.adds_bos and not bare)
        return tokens, [served.text_of([token]) for token in tokens] if body.return_token_strs else None

    tokens, pieces = await served.off_loop(encoded)
    return TokenizeResponse(count=len(tokens), max_model_len=served.llm.max_context, tokens=tokens, token_strs=pieces)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: InContext) -> DetokenizeResponse:
    """Token ids as text."""
    context.require_model(body.model)
    served = context.model
    served.require_tokenizer()
    size, most = served.llm.config.vocab_size, served.llm.max_context
    if len(body.tokens) > most:
        raise ApiError(400, f"tokens: {len(body.tokens):,} do not fit into the context of {most:,}.", param="tokens")
    outside = [token for token in body.tokens if not 0 <= token < size]
    if outside:
        raise ApiError(400, f"tokens: {outside[0]} is outside the vocabulary of 0 to {size - 1}.", param="tokens")
    return DetokenizeResponse(prompt=await served.off_loop(lambda: served.text_of(body.tokens)))


@router.head("/stats", include_in_schema=False)
@router.get("/stats")
async def stats(context: InContext) -> StatsResponse:
    """What the page shows."""
    server, llm = context.server, context.model.llm
    cache, engine = llm.cache, llm.engine
    used = (cache.num_pages - cache.pool.free_pages) * cache.page_size
    generated, prompt = server.metrics.speeds()
    mha = mha_bytes(llm.config)
    return StatsResponse(
        model=context.model.name,
        version=own_version(),
        uptime_s=round(time.time() - server.metrics.started_at, 3),
        context=context.model.capacity,
        sampling_defaults=dict(llm.sampling_defaults),
        chat_template=llm.tokenizer is not None and llm.tokenizer.chat_template_source == "checkpoint",
        requests=RequestCounts(
            running=engine.num_running, waiting=engine.num_waiting, finished=server.metrics.finished
        ),
        throughput=Throughput(generated_tokens_per_s=round(generated, 2), prompt_tokens_per_s=round(prompt, 2)),
        cache=CacheState(
            format=cache.format,
            used_tokens=used,
            capacity_tokens=cache.num_pages * cache.page_size,
            used_bytes=cache.used_bytes,
            capacity_bytes=cache.allocated_bytes,
            kept_bytes=cache.kept_bytes,
            mha_bytes=used * mha,
            mha_ratio=round(mha / cache.bytes_per_token, 2),
        ),
    )


def _card(context: InContext, name: str) -> ModelCard:
    served = context.model
    return ModelCard(
        id=name,
        display_name=name,
        created=served.created,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(served.created)),
        max_model_len=served.llm.max_context,
        max_input_tokens=served.capacity - 1,
    )
