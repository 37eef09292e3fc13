"""What two models expect of the same tokens, one beside the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens; sums over these.

    Attributes:
        tokens: that were predicted.
        source_nats: -log p of them by the source.
        nats: -log q of them by the model.
        divergence: KL(source || model) in nats.
        same: places in which the likeliest token is the same.
    """

    tokens: int
    source_nats: float
    nats: float
    divergence: float
    same: int

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.source_nats + other.source_nats,
            self.nats + other.nats,
            self.divergence + other.divergence,
            self.same + other.same,
        )


NOTHING = Comparison(0, 0.0, 0.0, 0.0, 0)
"""Of no tokens."""


@torch.no_grad()
def compare_logits(source: Tensor, model: Tensor, targets: Tensor) -> Comparison:
    """Compare the logits [T, V] of two models that are to predict `targets` [T]; what is summed is so in float64.

    Where one has more logits than the other (padding of its vocabulary), the divergence is that of the tokens that both
    have.
    """
    log_p, log_q = source.log_softmax(-1), model.log_softmax(-1)
    places = targets.unsqueeze(-1)
    source_nats, nats = (-float(each.gather(-1, places).double().sum()) for each in (log_p, log_q))
    same = int((source.argmax(-1) == model.argmax(-1)).sum())
    if source.shape != model.shape:
        common = min(source.shape[-1], model.shape[-1])
        log_p, log_q = source[:, :common].log_softmax(-1), model[:, :common].log_softmax(-1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return Comparison(len(targets), source_nats, nats, divergence, same)
