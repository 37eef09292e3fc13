"""Routed experts: each token goes through its K chosen gated MLPs."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from latentkv.ops.basic import linear
from latentkv.ops.checks import require, require_shape
from latentkv.ops.elementwise import silu_mul
from latentkv.ops.packed import PackedWeight


def gated_mlp(x: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """`down (silu(gate x) * up x)` (SwiGLU, arXiv 2002.05202): x [..., D], gate_up [2I, D], down [D, I] -> [..., D].

    Raises:
        OpError: the shapes do not fit together.
    """
    return linear(silu_mul(linear(x, gate_up)), down)


def moe_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight
) -> Tensor:
    """`sum_k weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t)`, e = expert_ids[t, k] (arXiv 2401.06066, eq. 3).

    Tokens are sorted by expert, so that each expert in use is two matrix products over one contiguous slice; experts
    without tokens cost nothing. Differentiable, works under autocast, and adds a token's experts in the order k.

    Args:
        x: [T, D] tokens.
        expert_ids: [T, K] integers in [0, E).
        weights: [T, K] what each chosen expert's output is multiplied by.
        gate_up: [E, 2I, D], packed or not; the first I rows are the gate's.
        down: [E, D, I].

    Returns:
        [T, D] in x's dtype; the weighted sum is taken in the wider of the experts' and the weights' dtype.

    Raises:
        OpError: the shapes do not fit together.
    """
    require_shape("x", x, (None, None))
    require_shape("expert_ids", expert_ids, (x.shape[0], None))
    require_shape("weights", weights, tuple(expert_ids.shape))
    num_experts = _require_experts(x, gate_up, down)
    if expert_ids.numel() == 0:
        return torch.zeros_like(x)

    flat_ids = expert_ids.reshape(-1)
    require(int(flat_ids.min()) >= 0, f"expert_ids name expert {int(flat_ids.min())}; experts count from 0")
    counts: list[int] = torch.bincount(flat_ids, minlength=num_experts).tolist()
    require(len(counts) == num_experts, f"expert_ids name expert {len(counts) - 1} of only {num_experts}")
    order = torch.argsort(flat_ids, stable=True)
    sorted_x = x[order // expert_ids.shape[1]]
    tokens = sorted_x.split(counts)
    if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
        outputs = [gated_mlp(own, gate_up.matrix(e), down.matrix(e)) for e, own in enumerate(tokens) if own.shape[0]]
    else:
        # unbind, not indexing: its gradient is one stack; each indexed expert would fill a zero tensor of them all.
        stacked = cast(Tensor, gate_up).unbind(), cast(Tensor, down).unbind()
        experts = zip(tokens, *stacked, strict=True)
        outputs = [_gated_mlp(own, into, out) for own, into, out in experts if own.shape[0]]
    chosen = torch.cat(outputs)[torch.argsort(order)].view(*expert_ids.shape, -1)
    return (chosen * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _require_experts(x: Tensor, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight) -> int:
    """Check the experts' shapes; return how many there are."""
    (num_experts, outer, inner), (count, wide, dim) = _shape(down), _shape(gate_up)
    require(
        isinstance(gate_up, PackedWeight) == isinstance(down, PackedWeight)
        and (count, wide, dim, outer) == (num_experts, 2 * inner, x.shape[1], x.shape[1]),
        f"moe_experts takes gate_up [E, 2I, D] and down [E, D, I], both packed or neither; for x {list(x.shape)} these "
        f"are {list(_shape(gate_up))} and {list(_shape(down))}",
    )
    return num_experts


def _shape(weight: Tensor | PackedWeight) -> tuple[int, ...]:
    if isinstance(weight, PackedWeight):
        return weight.count, weight.out_features, weight.in_features
    require(weight.ndim == 3, f"moe_experts takes stacked experts [E, O, D], not {list(weight.shape)}")
    return tuple(weight.shape)


def _gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
