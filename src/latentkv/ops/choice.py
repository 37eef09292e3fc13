"""The next token of each row of logits: temperature -> top_k -> top_p -> min_p -> choice.

The choice is the Gumbel-max trick: argmax(logits + noise) is distributed as softmax(logits). The noise is a pure
function of (seed, position): a row's token does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops.native import choice as native


@dataclass(frozen=True)
class ChoiceRule:
    """How a row's token is chosen.

    Attributes:
        seed: of the noise, with the position.
        position: of the token in its text.
        temperature: 0: the largest logit, and nothing else counts; otherwise logits are divided by it.
        top_k: the k largest are kept; 0 keeps all.
        top_p: the fewest likeliest are kept whose probability reaches it, in (0, 1]; 1 keeps all.
        min_p: those are kept that are at least so many times as likely as the likeliest; 0 keeps all.
    """

    seed: int
    position: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def choose_tokens(logits: Tensor, rules: Sequence[ChoiceRule]) -> list[int]:
    """Choose a token for each row.

    Args:
        logits: [T, V] float32; -inf forbids a token. Of a row in which nothing is finite any token is chosen.
        rules: T of them.

    Returns:
        T token ids. Of logits that are the same, the first.

    Raises:
        OpError: there are not as many rules as rows, or no logits.
    """
    if logits.ndim != 2 or logits.dtype is not torch.float32 or len(rules) != len(logits) or not logits.shape[1]:
        raise OpError(
            f"choose_tokens takes float32 logits [T, V] and T rules; these are {list(logits.shape)}, {logits.dtype}, "
            f"and {len(rules)} rules"
        )
    fast = native.choose_tokens(logits, rules)
    return [_choose(row, rule) for row, rule in zip(logits, rules, strict=True)] if fast is None else fast


def _choose(logits: Tensor, rule: ChoiceRule) -> int:
    if rule.temperature == 0:
        return int(logits.argmax())
    logits = scale_temperature(logits, rule.temperature)
    logits = keep_top_k(logits, rule.top_k)
    logits = keep_top_p(logits, rule.top_p)
    logits = keep_min_p(logits, rule.min_p)
    noise = gumbel_noise(rule.seed, rule.position, logits.shape[-1])
    return int((logits + noise.to(logits.device)).argmax())


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
