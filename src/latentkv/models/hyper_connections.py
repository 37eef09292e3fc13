"""Hyper-connections around a block: what it reads of a token's streams, and how they take in what it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentkv import ops
from latentkv.models.config import HyperConnectionConfig


class HyperConnection(nn.Module):
    """The connection of one block (mHC, arXiv 2512.24880), in place of a residual stream.

    Args:
        hidden_size: D, width of each stream.
        config: how many, and how they are mixed.
        norm_eps: of the norm that streams go through before they say how.
    """

    def __init__(self, hidden_size: int, config: HyperConnectionConfig, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        n = config.num_streams
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + n) * n))
        self.scale = nn.Parameter(torch.ones(3))

    def read(self, streams: Tensor) -> tuple[Tensor, ops.StreamMix]:
        """[..., n, D] -> what the block reads, [..., D], and how `write` is to mix."""
        config = self.config
        mix = ops.mix_streams(
            streams,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.norm_eps,
            eps=config.eps,
            iterations=config.sinkhorn_iterations,
        )
        return ops.collapse_streams(streams, mix.pre), mix

    def write(self, streams: Tensor, block: Tensor, mix: ops.StreamMix) -> Tensor:
        """The streams [..., n, D] after a block that gave [..., D]."""
        return ops.expand_streams(streams, block, mix)

    def reset_parameters(self) -> None:
        """Initialise for training, as published."""
        nn.init.normal_(self.fn, std=0.02)
        nn.init.zeros_(self.base)
        nn.init.ones_(self.scale)

    def keep_exact(self) -> None:
        """Hold in float32 after a cast what all streams are mixed by."""
        self.float()
