"""What two models expect of the same tokens, one beside the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 100 << 20
"""What all [n, V] tensors of a comparison take together."""

_TENSORS = 7
"""Those in float32 that exist at once: logits and log-softmax of both models, and what the divergence is made of."""


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


def blocks_of(total: int, vocab_size: int) -> Iterator[slice]:
    """Places out of `total`, in order, so few at a time that the logits of both models there take bounded memory.

    How many blocks there are depends on these two numbers alone.
    """
    size = max(1, _BLOCK_BYTES // (4 * vocab_size * _TENSORS))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


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
