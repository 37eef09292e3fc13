"""A converted model beside its source on text that neither saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.models.loading import load_model

_SEQUENCES_AT_ONCE = 4


class Quality(TypedDict):
    """Two models' perplexities, KL(source || converted) in nats a token, and how often their likeliest token agrees."""

    source: float
    converted: float
    divergence: float
    agreement: float
    tokens: int


@torch.no_grad()
def compare_models(source: Path, converted: Path, tokens: Tensor) -> Quality:
    """Predict every token of [sequences, length] ids but the first with both, in float32."""
    models = [load_model(folder, dtype=torch.float32) for folder in (source, converted)]
    nats, divergence, same, count = [0.0, 0.0], 0.0, 0, 0
    for rows in tokens.split(_SEQUENCES_AT_ONCE):
        targets = rows[:, 1:].flatten()
        log_p, log_q = (
            model.logits(model.forward_train(rows[:, :-1])).flatten(0, 1).log_softmax(-1) for model in models
        )
        for index, found in enumerate((log_p, log_q)):
            nats[index] += float(functional.nll_loss(found, targets, reduction="sum"))
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += len(targets)
    before, after = (math.exp(total / count) for total in nats)
    return Quality(source=before, converted=after, divergence=divergence / count, agreement=same / count, tokens=count)
