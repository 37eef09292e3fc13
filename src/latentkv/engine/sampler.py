"""Choosing the next token from float32 logits.

Order: structure -> bias -> repetition, presence and frequency penalties -> no end yet -> temperature -> top_k ->
top_p -> min_p -> choice (the order of transformers, with what it lacks at the front). What a structure forbids is -inf
from the beginning, and nothing that follows makes it finite again; the filters choose among what it allows.

The choice is the Gumbel-max trick: argmax(logits + noise) is distributed as softmax(logits). The noise is a pure
function of (seed, position): a request's text depends neither on the rest of the batch nor on how the steps were cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentkv.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) under the model itself: log-softmax of the raw logits, before any penalty or filter.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log-probability.
        top: the likeliest tokens and their log-probabilities, best first, as many as `SamplingParams.logprobs` asks.
    """

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


def sample(
    logits: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    tokens: Sequence[int],
    prompt_len: int | None = None,
    end_ids: Collection[int] = (),
    blocked: Tensor | None = None,
) -> int:
    """The token that follows `tokens`.

    Args:
        logits: [V] float32, raw.
        params: how to choose.
        seed: of the request; with the position (the length of `tokens`) it decides the noise.
        tokens: prompt and text so far, what the repetition penalty looks at.
        prompt_len: how many of them are the prompt; None: all. The other penalties look at the rest.
        end_ids: tokens that may not be chosen before `params.min_tokens`, unless a structure leaves no others.
        blocked: [V] bool, tokens that a structure forbids; not all of them.
    """
    text = tokens[len(tokens) if prompt_len is None else prompt_len :]
    if blocked is not None:
        logits = logits.masked_fill(blocked, -math.inf)
    logits = add_bias(logits, params.logit_bias)
    logits = penalize_repetition(logits, tokens, params.repetition_penalty)
    logits = penalize_text(logits, text, params.presence_penalty, params.frequency_penalty)
    if len(text) < params.min_tokens and end_ids:
        others = logits.index_fill(0, torch.tensor(sorted(end_ids), device=logits.device), -math.inf)
        if blocked is None or others.max() > -math.inf:
            logits = others
    if params.greedy:
        return int(logits.argmax())
    logits = scale_temperature(logits, params.temperature)
    logits = keep_top_k(logits, params.top_k)
    logits = keep_top_p(logits, params.top_p)
    logits = keep_min_p(logits, params.min_p)
    noise = gumbel_noise(seed, len(tokens), logits.shape[-1])
    return int((logits + noise.to(logits.device)).argmax())


def token_logprobs(logits: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """What `SamplingParams.logprobs = count` reports of `token_ids` [T], from raw `logits` [T, V]."""
    logprobs = logits.float().log_softmax(-1)
    best, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    chosen = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None])
    rows = zip(token_ids, chosen[:, 0].tolist(), ids.tolist(), best.tolist(), strict=True)
    return [TokenLogprobs(token, own, dict(zip(top, values, strict=True))) for token, own, top, values in rows]


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add to the logits of some tokens, which must be in the vocabulary."""
    if not bias:
        return logits
    tokens = torch.tensor(list(bias), dtype=torch.int64, device=logits.device)
    return logits.index_add(0, tokens, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


def penalize_text(logits: Tensor, text: Sequence[int], presence: float, frequency: float) -> Tensor:
    """Subtract `presence` from the logits of the text's tokens, and `frequency` for each time that it holds them."""
    if not text or (presence == 0 and frequency == 0):
        return logits
    counts = Counter(text)
    return add_bias(logits, {token: -(presence + frequency * times) for token, times in counts.items()})


def penalize_repetition(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty`, multiply the others (CTRL, arXiv 1909.05858, 4.1)."""
    if penalty == 1:
        return logits
    seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature in float64: the best token stays at 0, so that no temperature overflows."""
    logits = logits.double()
    return (logits - logits.max()) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the `k` largest logits become -inf (ties with the k-th stay); 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probability reaches `p`; the rest become -inf (arXiv 1904.09751)."""
    if p == 1:
        return logits
    probs = logits.softmax(-1)
    # Tokens below (1 - p) / V together weigh less than 1 - p: the nucleus is full before them, so few need sorting.
    floor = min((1 - p) / logits.shape[-1], float(probs.max()))
    candidates = (probs >= floor).nonzero().squeeze(-1)
    ordered, order = probs[candidates].sort(descending=True, stable=True)
    kept = candidates[order[ordered.cumsum(0) - ordered < p]]
    return torch.full_like(logits, -math.inf).index_copy(0, kept, logits[kept])


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens less than `p` times as likely as the likeliest become -inf (arXiv 2407.01082); 0 keeps all."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(p), -math.inf)


def gumbel_noise(seed: int, position: int, size: int) -> Tensor:
    """[size] float64 Gumbel noise that depends on `seed` and `position` alone (Philox, a counter-based generator)."""
    philox = np.random.Philox(key=np.array([seed, position], dtype=np.uint64))
    uniform = np.random.Generator(philox).random(size)
    return torch.from_numpy(-np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny))))
