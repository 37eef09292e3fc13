"""Lightning attention (arXiv 2401.04658): a layer whose memory is a matrix a head, which forgets at a fixed pace."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from latentkv import ops
from latentkv.models.config import LightningConfig
from latentkv.models.layers import Linear, RMSNorm
from latentkv.models.packing import Packer
from latentkv.models.recurrent import RecurrentAttention, SlotUses
from latentkv.models.rope import Rotary
from latentkv.state import RecurrentState
from latentkv.weights import PackedWeight


class LightningAttention(RecurrentAttention):
    """One layer of H heads of D dimensions, W = H D.

    `forward` runs whole sequences (differentiable), `attend` goes on from the states in a cache's slots.

    Args:
        hidden_size: width of the residual stream.
        config: heads, groups of the output's norm, and how fast the layer forgets.

    Attributes:
        inputs: packed, what is multiplied with the layer's input: queries, keys, values and the output's gate.
    """

    inputs: PackedWeight | None = None

    def __init__(self, hidden_size: int, config: LightningConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        self.query_key_value = Linear(hidden_size, 3 * width, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.norm_eps)
        self.g_proj = Linear(hidden_size, width, bias=False)
        self.g_norm = RMSNorm(width, config.norm_eps)
        self.o_proj = Linear(width, hidden_size, bias=False)
        _log_decay_on(torch.device("cpu"), config)  # made before a step is recorded

    def forward(self, x: Tensor, positions: Rotary) -> Tensor:
        """Whole sequences without a cache: [B, S, hidden] -> [B, S, hidden]."""
        return self.o_proj(ops.lightning_whole(*self._project(x), positions.cos, positions.sin, self._weights))

    def recur(self, x: Tensor, positions: Rotary, memory: RecurrentState, uses: SlotUses) -> Tensor:
        """See `RecurrentAttention`."""
        state = ops.LightningState(*memory.tensors)
        return ops.lightning_attend(*self._project(x), positions.cos, positions.sin, self._weights, state, **uses)

    def pack(self, packer: Packer) -> None:
        """See `Packable`: both projections of the input are one product."""
        self.inputs = packer("query_key_value.weight", "g_proj.weight")
        del self.query_key_value, self.g_proj

    @property
    def _weights(self) -> ops.LightningWeights:
        return ops.LightningWeights(
            _log_decay_on(self.g_norm.weight.device, self.config),
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.g_norm.weight,
            self.config.norm_eps,
            self.config.num_groups,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `ops.lightning_attend` takes first: qkv [..., 3 W] and the output's gate [..., W]."""
        if self.inputs is None:
            return self.query_key_value(x), self.g_proj(x)
        both = ops.linear(x, self.inputs)
        width = self.config.num_heads * self.config.head_dim
        return both[..., : 3 * width], both[..., 3 * width :]


@cache
def _log_decay_on(device: torch.device, config: LightningConfig) -> Tensor:
    """[H] float32, made once: it is no parameter, so that no cast of the model rounds it."""
    return torch.tensor(config.log_decay, dtype=torch.float32, device="cpu").to(device)
