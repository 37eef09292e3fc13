"""`Request`: what was asked, validated once. The engine below it trusts what it reads."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from latentkv.engine.constraint import Constraint
from latentkv.errors import RequestError
from latentkv.sampling_params import MAX_SEED, SamplingParams
from latentkv.token_ids import require_token_ids


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    Attributes:
        prompt_token_ids: one token or more, all inside the vocabulary.
        params: how tokens are chosen and when they end.
        seed: `params.seed`, or a fresh one.
        max_new_tokens: `params.max_tokens`, clipped to what the context holds after the prompt.
        constraint: `params.structure`, compiled.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_new_tokens: int
    constraint: Constraint | None = None

    def choices(self) -> list[Request]:
        """The requests that make the completions which `params` ask for: the same but for the seed.

        Where the likeliest are to be found, they report their tokens' log-probabilities.
        """
        params = self.params
        if params.num_choices > params.n and params.logprobs is None:
            params = replace(params, logprobs=0)
        return [replace(self, params=params, seed=(self.seed + i) % (MAX_SEED + 1)) for i in range(params.num_choices)]

    @classmethod
    def create(
        cls,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        vocab_size: int,
        max_context: int,
        constraint: Constraint | None = None,
    ) -> Request:
        """Validate a prompt for a model of `vocab_size` tokens that sees at most `max_context` of them.

        `constraint` is what `params.structure` was compiled to.

        Raises:
            RequestError: the prompt is empty, leaves no room for a new token, or leaves the vocabulary; or a stop token
                or a biased one is outside the vocabulary, or more logprobs than there are tokens are asked for; or a
                structure comes without its constraint.
        """
        prompt = validate_token_ids(prompt_token_ids, vocab_size=vocab_size)
        if len(prompt) + 1 > max_context:
            raise RequestError(
                f"The prompt has {len(prompt):,} tokens, and a context of {max_context:,} holds a prompt of at most "
                f"{max_context - 1:,}: shorten it, or load the model with a larger max_context if it has one."
            )
        require_token_ids(params.stop_token_ids, "stop_token_ids", RequestError, vocab_size=vocab_size)
        require_token_ids(params.logit_bias, "logit_bias", RequestError, vocab_size=vocab_size)
        for name, asked in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if asked is not None and asked > vocab_size:
                raise RequestError(f"{name}={asked} is more than the vocabulary's {vocab_size} tokens.")
        if (params.structure is None) != (constraint is None):
            raise RequestError("A structure and its constraint come together: compile params.structure.")
        seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        return cls(prompt, params, seed, min(params.max_tokens, max_context - len(prompt)), constraint)


def validate_token_ids(token_ids: Iterable[int], *, vocab_size: int) -> tuple[int, ...]:
    """`token_ids` as a tuple, each known to be an integer inside the vocabulary.

    Raises:
        RequestError: there is none, or one is not an integer from 0 to vocab_size - 1; the message names it.
    """
    if not isinstance(cast(object, token_ids), Iterable) or isinstance(token_ids, bytes):
        raise RequestError(f"A prompt is a string or a list of token ids, not {type(token_ids).__name__}.")
    ids = tuple(cast("Iterable[object]", token_ids))
    if not ids:
        raise RequestError("The prompt is empty: give at least one token.")
    for index, token in enumerate(ids):
        if type(token) is not int:
            raise RequestError(f"Prompt token {index} is {token!r}, and a token id is an integer.")
        if not 0 <= token < vocab_size:
            raise RequestError(f"Prompt token {index} is {token}, outside the vocabulary of 0 to {vocab_size - 1}.")
    return cast("tuple[int, ...]", ids)
