"""Choosing the next tokens from float32 logits.

Order: structure -> bias -> repetition, presence and frequency penalties -> no end yet, which are edits of some logits;
then the choice of all rows at once (`ops/choice.py`): temperature -> top_k -> top_p -> min_p -> noise. It is the order
of transformers, with what it lacks at the front. What a structure forbids is -inf from the beginning, and nothing that
follows makes it finite again; the filters choose among what it allows.

A request's text depends neither on the rest of the batch nor on how the steps were cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentkv import ops
from latentkv.sampling_params import SamplingParams


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


@dataclass(frozen=True)
class NextToken:
    """What decides, beside the logits, which token follows.

    Attributes:
        params: how to choose.
        seed: of the request; with the position (the length of `tokens`) it decides the noise.
        tokens: prompt and text so far, what the repetition penalty looks at.
        prompt_len: how many of them are the prompt; None: all. The other penalties look at the rest.
        end_ids: tokens that may not be chosen before `params.min_tokens`, unless a structure leaves no others.
        blocked: [V] bool, tokens that a structure forbids; not all of them.
    """

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    prompt_len: int | None = None
    end_ids: Collection[int] = ()
    blocked: Tensor | None = None

    @property
    def edits(self) -> bool:
        """Whether logits may change before the choice."""
        params = self.params
        penalises = (
            params.choice.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        return self.blocked is not None or bool(params.logit_bias) or penalises or self.may_not_end

    @property
    def may_not_end(self) -> bool:
        """Whether the text is too short to end."""
        written = 0 if self.prompt_len is None else len(self.tokens) - self.prompt_len
        return written < self.params.min_tokens and bool(self.end_ids)


def sample(logits: Tensor, asked: Sequence[NextToken]) -> list[int]:
    """The tokens that follow.

    Args:
        logits: [T, V] float32, raw; they stay as they are.
        asked: T of them.
    """
    raw = logits
    for row, each in enumerate(asked):
        if each.edits:
            if logits is raw:
                logits = raw.clone()
            logits[row] = _edit(raw[row], each)
    return ops.choose_tokens(logits, [_rule(each) for each in asked])


def _edit(logits: Tensor, asked: NextToken) -> Tensor:
    """The row with what is forbidden, biased and penalised."""
    params, tokens = asked.params, asked.tokens
    text = tokens[len(tokens) if asked.prompt_len is None else asked.prompt_len :]
    if asked.blocked is not None:
        logits = logits.masked_fill(asked.blocked, -math.inf)
    logits = add_bias(logits, params.logit_bias)
    logits = penalize_repetition(logits, tokens, params.choice.repetition_penalty)
    logits = penalize_text(logits, text, params.presence_penalty, params.frequency_penalty)
    if asked.may_not_end:
        # A checkpoint may name end tokens that its vocabulary does not have.
        ends = [token for token in asked.end_ids if token < len(logits)]
        others = logits.index_fill(0, torch.tensor(ends, dtype=torch.int64, device=logits.device), -math.inf)
        if asked.blocked is None or others.max() > -math.inf:
            logits = others
    return logits


def _rule(asked: NextToken) -> ops.ChoiceRule:
    choice = asked.params.choice
    return ops.ChoiceRule(asked.seed, len(asked.tokens), choice.temperature, choice.top_k, choice.top_p, choice.min_p)


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
    penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
    # What is forbidden stays so, and no penalty is so small that a number overflows.
    penalised = penalised.nan_to_num(nan=-math.inf, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)
    return logits.index_copy(0, seen, penalised)
