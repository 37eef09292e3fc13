"""Independent hyper-connections (Hy4): residual streams that blocks read a sum of and are added to, never mixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentkv import ops
from latentkv.models.config import IndependentHyperConnectionConfig


class _Gates(nn.Module):
    """Learned sigmoids of what all streams of a token hold, `groups` for each stream; float32 whatever the dtype."""

    def __init__(
        self, hidden_size: int, config: IndependentHyperConnectionConfig, norm_eps: float, groups: int
    ) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        n = config.num_streams
        self.fn = nn.Parameter(torch.empty(groups * n, n * hidden_size))
        self.base = nn.Parameter(torch.zeros(groups * n))
        self.scale = nn.Parameter(torch.ones(groups))

    def gates(self, streams: Tensor) -> tuple[Tensor, ...]:
        """[..., n, D] -> [..., n] for each group: what streams count in a sum, what a block counts in them."""
        config = self.config
        return ops.gate_streams(
            streams,
            self.fn,
            self.base,
            self.scale,
            norm_eps=self.norm_eps,
            eps=config.eps,
            magnitude=config.magnitude,
        )

    def reset_parameters(self) -> None:
        """Initialise for training: at first all streams together count once, and a block half its most in each."""
        n = self.config.num_streams
        nn.init.normal_(self.fn, std=0.006)
        nn.init.zeros_(self.base)
        with torch.no_grad():
            self.base[:n] = -torch.tensor(float(max(n - 1, 1))).log()
        nn.init.constant_(self.scale, 0.01)

    def keep_exact(self) -> None:
        """Hold in float32 after a cast what streams are read and written by."""
        self.float()


class IndependentHyperConnection(_Gates):
    """The connection of one block, in place of a residual stream.

    Args:
        hidden_size: D, width of each stream.
        config: how many, and what blocks count in them.
        norm_eps: of the norm that streams go through before they say how.
    """

    def __init__(self, hidden_size: int, config: IndependentHyperConnectionConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps, groups=2)

    def read(self, streams: Tensor) -> tuple[Tensor, ops.StreamMix]:
        """[..., n, D] -> what the block reads, [..., D], and how `write` is to add."""
        pre, post = self.gates(streams)
        return ops.collapse_streams(streams, pre), ops.StreamMix(pre, post, None)

    def write(self, streams: Tensor, block: Tensor, mix: ops.StreamMix) -> Tensor:
        """The streams [..., n, D] after a block that gave [..., D]."""
        return ops.expand_streams(streams, block, mix)


class HyperHead(_Gates):
    """The sum of all streams that is normed last; its arguments are those of a connection."""

    def __init__(self, hidden_size: int, config: IndependentHyperConnectionConfig, norm_eps: float) -> None:
        super().__init__(hidden_size, config, norm_eps, groups=1)

    def forward(self, streams: Tensor) -> Tensor:
        """[..., n, D] -> [..., D]."""
        (weights,) = self.gates(streams)
        return ops.collapse_streams(streams, weights)
