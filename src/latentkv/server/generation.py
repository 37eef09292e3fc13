"""What all routes that generate have in common: run requests, count, and put together or stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection
from itertools import accumulate

from latentkv.completion import Completion, Piece, best_of, join_pieces
from latentkv.engine import Request
from latentkv.server.context import Context
from latentkv.server.errors import ApiError
from latentkv.server.metrics import RequestClock
from latentkv.server.protocol.sampling import Usage
from latentkv.server.settings import MAX_PROMPTS


class Job:
    """The completions of one HTTP request, from its arrival on.

    Args:
        context: of the request.
        prompts: validated, one a prompt.
        keep: special tokens that stay in the text.

    Attributes:
        choices: all completions of all prompts, those of a prompt one after another.
        arrived: when the request did, on the monotonic clock, in seconds.
        began: when its first token came, likewise; None before.

    Raises:
        ApiError: more completions than are allowed.
        LatentKVError: as `ServedModel.submit`.
    """

    def __init__(self, context: Context, prompts: list[Request], *, keep: Collection[str] = ()) -> None:
        if sum(prompt.params.num_choices for prompt in prompts) > MAX_PROMPTS:
            raise ApiError(400, f"n: all prompts together may have {MAX_PROMPTS} completions.", param="n")
        self.choices = [choice for prompt in prompts for choice in prompt.choices()]
        most = context.server.settings.max_open
        if len(self.choices) > most:
            raise ApiError(400, f"n: this server runs at most {most} completions at once.", param="n")
        self._unfinished = len(self.choices)
        self._context = context
        self._prompts = prompts
        self._tokens = [0] * len(self.choices)
        self._cached = [0] * len(self.choices)
        self._texts = [""] * len(self.choices)
        self.arrived = time.monotonic()
        self.began: float | None = None
        self._clocks = [RequestClock(self.arrived) for _ in self.choices]
        server = context.server
        self._logs_text = server.settings.log_prompts
        self._generation = server.model.submit(self.choices, context.salt, server.settings.request_seconds, keep=keep)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        firsts = accumulate((prompt.params.num_choices for prompt in self._prompts[:-1]), initial=0)
        return Usage.of(
            sum(len(prompt.prompt_token_ids) for prompt in self._prompts),
            sum(self._tokens),
            sum(self._cached[first] for first in firsts),  # the others find what the first one has read
        )

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """(choice, what is new of it), until all have ended."""
        metrics = self._context.server.metrics
        async for index, piece in self._generation.pieces():
            self.began = self.began or time.monotonic()
            self._tokens[index] += len(piece.token_ids)
            self._cached[index] += piece.cached_tokens or 0
            if self._logs_text:
                self._texts[index] += piece.text
            metrics.tokens(self._clocks[index], len(piece.token_ids))
            if piece.finish_reason:
                self._unfinished -= 1
                prompt_tokens = len(self.choices[index].prompt_token_ids)
                metrics.finish(self._clocks[index], prompt_tokens, self._tokens[index], piece.finish_reason)
            yield index, piece

    def close(self) -> None:
        """Give up what has not ended, and note what it was; more than once does no harm."""
        self._generation.close()
        self._context.server.metrics.give_up(self._unfinished)
        self._unfinished = 0
        usage = self.usage
        self._context.log |= {
            **usage.model_dump(exclude={"prompt_tokens_details"}),
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        }
        if self._logs_text:
            text_of = self._context.model.text_of
            self._context.log["prompts"] = [text_of(prompt.prompt_token_ids) for prompt in self._prompts]
            self._context.log["completions"] = self._texts

    async def completions(self) -> list[Completion]:
        """All of them, the best where more were made than asked for; given up when the client leaves."""
        try:
            return await self._context.unless_client_leaves(self._completions())
        finally:
            self.close()

    async def _completions(self) -> list[Completion]:
        parts: list[list[Piece]] = [[] for _ in self.choices]
        async for index, piece in self.pieces():
            parts[index].append(piece)
        made = iter([join_pieces(choice, own) for choice, own in zip(self.choices, parts, strict=True)])
        return [
            completion
            for prompt in self._prompts
            for completion in best_of([next(made) for _ in range(prompt.params.num_choices)], prompt.params)
        ]
