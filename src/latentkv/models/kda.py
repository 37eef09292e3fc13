"""Kimi Delta Attention (arXiv 2510.26692): a layer whose memory is a matrix a head, however long the text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentkv import ops
from latentkv.models.config import KDAConfig
from latentkv.models.layers import Linear, RMSNorm
from latentkv.models.packing import Packer
from latentkv.models.recurrent import RecurrentAttention, SlotUses
from latentkv.models.rope import Rotary
from latentkv.ops.kda import TAPS
from latentkv.state import RecurrentState
from latentkv.weights import PackedWeight

EXACT = ("A_log", "dt_bias", "conv_taps")
"""Parameters that stay float32 whatever the model's dtype: a decay rounded to bf16 forgets at another pace."""


class KimiDeltaAttention(RecurrentAttention):
    """One layer of H heads of D dimensions, W = H D.

    `forward` runs whole sequences (differentiable), `attend` goes on from the states in a cache's slots.

    Args:
        hidden_size: width of the residual stream.
        config: heads and gates.

    Attributes:
        inputs: packed, what is multiplied first and most: q, k, v, and the two gates where each is one matrix.
        small_inputs: packed, the other products of the layer's input.
    """

    inputs: PackedWeight | None = None
    small_inputs: PackedWeight | None = None

    def __init__(self, hidden_size: int, config: KDAConfig) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.num_heads, config.head_dim
        width = heads * dim
        self.q_proj = Linear(hidden_size, width, bias=False)
        self.k_proj = Linear(hidden_size, width, bias=False)
        self.v_proj = Linear(hidden_size, width, bias=False)
        # As the kernel reads them; checkpoints have a [W, 1, 4] each for q, k and v (`checkpoint.names`).
        self.conv_taps = nn.Parameter(torch.zeros(TAPS, 3 * width))
        if config.low_rank_gates:
            self.f_a_proj = Linear(hidden_size, dim, bias=False)
            self.f_b_proj = Linear(dim, width, bias=False)
            self.g_a_proj = Linear(hidden_size, dim, bias=False)
            self.g_b_proj = Linear(dim, width, bias=False)
        else:
            self.f_proj = Linear(hidden_size, width, bias=False)
            self.g_proj = Linear(hidden_size, width, bias=False)
        self.b_proj = Linear(hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(1, 1, heads, 1) if config.rates_around else torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.o_norm = RMSNorm(dim, config.norm_eps)
        self.o_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Rotary | None = None) -> Tensor:
        """Whole sequences without a cache: [B, S, hidden] -> [B, S, hidden]; it knows order without positions."""
        return self.o_proj(ops.kda_whole(*self._project(x), self._weights))

    def recur(self, x: Tensor, positions: Rotary, memory: RecurrentState, uses: SlotUses) -> Tensor:
        """See `RecurrentAttention`."""
        return ops.kda_attend(*self._project(x), self._weights, ops.KDAState(*memory.tensors), **uses)

    def pack(self, packer: Packer) -> None:
        """See `Packable`: what is quantised alike is one product."""
        large = ("q_proj", "k_proj", "v_proj")
        if self.config.low_rank_gates:
            small = ("f_a_proj", "g_a_proj", "b_proj")
        else:
            large, small = (*large, "f_proj", "g_proj"), ("b_proj",)
        self.inputs = packer(*(f"{name}.weight" for name in large))
        self.small_inputs = packer(*(f"{name}.weight" for name in small))
        for name in (*large, *small):
            delattr(self, name)

    def reset_parameters(self) -> None:
        """Initialise what is no projection, as published: rates of 1 to 16 times small steps, taps at random."""
        nn.init.uniform_(self.conv_taps, -(TAPS**-0.5), TAPS**-0.5)
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0).log_()
            step = self.dt_bias.uniform_(-6.9, -2.3).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def keep_exact(self) -> None:
        """Hold in float32 after a cast what the recurrence is computed with."""
        for name in EXACT:
            parameter = self.get_parameter(name)
            self.register_parameter(name, nn.Parameter(parameter.detach().float(), parameter.requires_grad))

    @property
    def _weights(self) -> ops.KDAWeights:
        return ops.KDAWeights(
            self.conv_taps,
            self.A_log.flatten(),
            self.dt_bias,
            self.o_norm.weight,
            self.o_norm.eps,
            self.config.lower_bound,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `ops.kda_attend` takes first: qkv [..., 3 W], gate [..., W], beta [..., H], output gate [..., W]."""
        dim = self.config.head_dim
        width = self.config.num_heads * dim
        if self.inputs is None or self.small_inputs is None:
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
            if self.config.low_rank_gates:
                return qkv, self.f_b_proj(self.f_a_proj(x)), self.b_proj(x), self.g_b_proj(self.g_a_proj(x))
            return qkv, self.f_proj(x), self.b_proj(x), self.g_proj(x)
        large, small = ops.linear(x, self.inputs), ops.linear(x, self.small_inputs)
        if self.config.low_rank_gates:
            forget, output = self.f_b_proj(small[..., :dim]), self.g_b_proj(small[..., dim : 2 * dim])
            return large, forget, small[..., 2 * dim :], output
        qkv, forget, output = large[..., : 3 * width], large[..., 3 * width : 4 * width], large[..., 4 * width :]
        return qkv, forget, small, output
