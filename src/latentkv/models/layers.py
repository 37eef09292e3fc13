"""The small modules that every layer is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv import ops
from latentkv.models.packing import Packer
from latentkv.weights import PackedWeight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in x's dtype."""
        return ops.rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """A norm that gates itself through a bottleneck of `rank` (A.X-K2); its tensors are called as in checkpoints."""

    def __init__(self, dim: int, rank: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.W_down = nn.Linear(dim, rank, bias=False)
        self.W_up = nn.Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in x's dtype."""
        return ops.gated_rms_norm(x, self.norm.weight, self.norm.eps, self.W_down.weight, self.W_up.weight)


class Linear(nn.Linear):
    """`x W^T + b`, W as trained or packed for inference; the result has `out_dtype`, or x's dtype."""

    packed: PackedWeight | None = None
    out_dtype: torch.dtype | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], plus the residual [..., out]."""
        weight = self.weight if self.packed is None else self.packed
        return ops.linear(input, weight, self.bias, residual=residual, out_dtype=self.out_dtype)

    def pack(self, packer: Packer) -> None:
        """See `Packable`."""
        self.packed = packer("weight")


class OutputHead(Linear):
    """The projection to logits; an `exact` one is float32 whatever the model's dtype, unless it is quantised."""

    def __init__(self, in_features: int, out_features: int, *, exact: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.exact = exact

    def pack(self, packer: Packer) -> None:
        """See `Packable`; where nothing is to be quantised an exact one stays as it is, for packing would round it."""
        if not self.exact or packer.quantises("weight"):
            super().pack(packer)

    def keep_exact(self) -> None:
        """Hold the weight in float32 after a cast, where it is trained so."""
        if self.exact:
            self.float()


class Embedding(nn.Embedding):
    """A vector for each token; without storage it is not initialised, for which torch's compiler would be loaded."""

    def reset_parameters(self) -> None:
        """As torch does."""
        if not self.weight.is_meta:
            super().reset_parameters()


class MLP(nn.Module):
    """SwiGLU feed-forward block (arXiv 2002.05202); `limit` bounds its activation, see `ops.silu_mul`.

    The result has `out_dtype`, or x's dtype.
    """

    gate_up: PackedWeight | None = None
    down: PackedWeight | None = None
    out_dtype: torch.dtype | None = None

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = False, limit: ops.SwigluLimit | None = None
    ) -> None:
        super().__init__()
        self.has_bias = bias
        self.limit = limit
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden], plus the residual."""
        if self.gate_up is not None and self.down is not None:
            return ops.gated_mlp(
                x, self.gate_up, self.down, residual=residual, limit=self.limit, out_dtype=self.out_dtype
            )
        if self.limit is not None:
            gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
            return self.down_proj(ops.silu_mul(gate_up, self.limit), residual)
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x), residual)

    def pack(self, packer: Packer) -> None:
        """See `Packable`; a block with biases is packed projection by projection."""
        if not self.has_bias:
            self.gate_up = packer("gate_proj.weight", "up_proj.weight")
            self.down = packer("down_proj.weight")
            del self.gate_proj, self.up_proj, self.down_proj
