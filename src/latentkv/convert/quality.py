"""A converted model beside its source on text that neither saw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from latentkv.engine.comparison import NOTHING, blocks_of, compare_logits
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model
from latentkv.train.ranks import DataRanks

_SEQUENCES_AT_ONCE = 4


class Quality(TypedDict):
    """Two models' perplexities, KL(source || converted) in nats a token, and how often their likeliest token agrees.

    `tokens` were predicted; `sample` tells the text from every other.
    """

    source: float
    converted: float
    divergence: float
    agreement: float
    tokens: int
    sample: str


def compare_models(
    source: Path,
    converted: Path,
    tokens: Tensor,
    *,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Quality:
    """`compare` the models of two folders, in float32."""
    before, after = (load_model(folder, dtype=torch.float32) for folder in (source, converted))
    return compare(before, after, tokens, on_progress=on_progress)


@torch.no_grad()
def compare(
    source: Decoder,
    converted: Decoder,
    tokens: Tensor,
    *,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    ranks: DataRanks | None = None,
) -> Quality:
    """Predict every token of [sequences, length] int64 ids but the first with both.

    A perplexity too large for a float is infinite. `on_progress` is called with the sequences done, and all of them.
    Of several processes each predicts its part of the sequences, and all return the same.
    """
    ranks = ranks or DataRanks()
    rows_done, found = 0, NOTHING
    batches = tokens.split(min(_SEQUENCES_AT_ONCE, -(-len(tokens) // ranks.size)))
    for first in range(0, len(batches), ranks.size):
        # Models whose weights are shared out compute in all processes at once, and as often in each: in those too that
        # have fewer sequences left, or none. What these compute instead does not count.
        together = batches[first : first + ranks.size]
        rows = together[min(ranks.rank, len(together) - 1)]
        counted = rows[:, 1:].numel() if ranks.rank < len(together) else 0
        if ranks.size > 1:
            rows = torch.cat([rows, rows[:1].expand(len(batches[0]) - len(rows), -1)])
        targets = rows[:, 1:].flatten()
        before, after = (model.forward_train(rows[:, :-1]).flatten(0, 1) for model in (source, converted))
        for block in blocks_of(len(targets), source.config.vocab_size):
            logits = source.logits(before[block]), converted.logits(after[block])
            kept = max(0, counted - block.start)
            found += compare_logits(logits[0][:kept], logits[1][:kept], targets[block][:kept])
        rows_done += sum(map(len, together))
        on_progress(rows_done, len(tokens))
    sums = ranks.total(torch.tensor(astuple(found), dtype=torch.float64)).tolist()
    count, *nats, divergence, same = sums
    source_perplexity, perplexity = (_perplexity(total / count) for total in nats)
    return Quality(
        source=source_perplexity,
        converted=perplexity,
        divergence=divergence / count,
        agreement=same / count,
        tokens=int(count),
        sample=hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
    )


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
