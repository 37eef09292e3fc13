"""Low-rank updates of attention's projections: little to train, merged into the weights in the end (arXiv 2106.09685).

A projection W [out, in] becomes W + (alpha / rank) B A with A [rank, in] and B [out, rank]. B is zero at the start, so
that nothing has changed yet; W is not trained.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from latentkv.models.decoder import Decoder
from latentkv.models.layers import Linear
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.train.ranks import own_rows, whole

PROJECTIONS = ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""What is adapted. A query's bottleneck (q_a_proj) holds biases alone after a conversion, and stays as it is."""


class LoRALinear(nn.Module):
    """A projection and its update.

    Args:
        base: the projection; its weight and bias are frozen.
        rank: of the update.
        alpha: the update is multiplied by alpha / rank.
        generator: that A is drawn with, from a normal distribution of variance 1 / in.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        drawn = torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5
        self.lora_a = nn.Parameter(drawn.to(base.weight.dtype))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], plus the residual [..., out]."""
        return self.base(x, residual) + self.scale * (x @ self.lora_a.mT) @ self.lora_b.mT

    @torch.no_grad()
    def merged(self) -> Linear:
        """The projection with the update added to its weight, in place."""
        rows, _ = own_rows(self.base.weight)  # of which the update's are as many
        rows += self.scale * own_rows(self.lora_b)[0] @ whole(self.lora_a)
        return self.base


@contextmanager
def low_rank_updates(model: Decoder, *, rank: int, alpha: float, seed: int) -> Generator[None]:
    """Give a model's latent attention updates to train; they are merged when the block ends without an error.

    All other parameters are frozen. After an error the projections are as they were.

    Args:
        model: with latent attention.
        rank: of each update.
        alpha: an update is multiplied by alpha / rank.
        seed: of A.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for attention, name in _adapted(model):
        setattr(attention, name, LoRALinear(getattr(attention, name), rank, alpha, generator))
    merge = False
    try:
        yield
        merge = True
    finally:
        for attention, name in _adapted(model):
            update = cast("LoRALinear", getattr(attention, name))
            setattr(attention, name, update.merged() if merge else update.base)


def _adapted(model: Decoder) -> Iterator[tuple[MultiHeadLatentAttention, str]]:
    layers = [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]
    return ((attention, name) for attention in layers for name in PROJECTIONS if hasattr(attention, name))
