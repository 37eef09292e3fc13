"""Gated MLPs: one for all tokens, or the K that a router chose for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import require_floats, require_integers, require_same_dtype, require_shape
from latentkv.errors import OpError
from latentkv.ops.elementwise import silu_mul
from latentkv.ops.linear import linear
from latentkv.ops.native import moe as native
from latentkv.ops.swiglu_limit import SwigluLimit
from latentkv.ops.triton import calls as triton
from latentkv.weights.layout import PackedWeight


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    *,
    residual: Tensor | None = None,
    limit: SwigluLimit | None = None,
    num_zero_experts: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sum_k weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t)`, e = expert_ids[t, k] (arXiv 2401.06066, eq. 3).

    Tokens are sorted by expert, so that each expert in use is two matrix products over one contiguous slice; experts
    without tokens cost nothing. A token's experts are added in the order k. Tensors: differentiable, works under
    autocast. Packed weights: the products are added in float32, and a token's result does not depend, bit for bit, on
    the other tokens or the number of threads.

    Args:
        x: [T, D] tokens; bfloat16 or float32 for packed weights.
        expert_ids: [T, K] integers in [0, E + num_zero_experts).
        weights: [T, K] what each chosen expert's output is multiplied by.
        gate_up: [E, 2I, D]; the first I rows are the gate's.
        down: [E, D, I], packed if gate_up is.
        residual: [T, D] added to the sum before it is rounded, or None.
        limit: of the activation, see `silu_mul`.
        num_zero_experts: numbered from E on, each gives a token back as it is (arXiv 2509.01322, section 2.1).
        out_dtype: of the result; None is x's.

    Returns:
        [T, D]; the weighted sum is taken in the wider of the experts' and the weights' dtype.

    Raises:
        OpError: the shapes do not fit together.
    """
    require_shape("x", x, (None, None))
    require_shape("expert_ids", expert_ids, (x.shape[0], None))
    require_shape("weights", weights, (x.shape[0], expert_ids.shape[1]))
    if residual is not None:
        require_shape("residual", residual, (x.shape[0], x.shape[1]))
    require_integers("expert_ids", expert_ids)
    num_experts = _require_experts(x, gate_up, down)
    out_dtype = out_dtype or x.dtype
    if expert_ids.numel() == 0:
        return torch.zeros_like(x, dtype=out_dtype) if residual is None else residual.to(out_dtype, copy=True)
    if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
        fast = native.moe_experts(x, expert_ids, weights, gate_up, down, residual, limit, num_zero_experts, out_dtype)
        if fast is not None:
            return fast
    require_floats(x=x, weights=weights, residual=residual)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        require_same_dtype("moe_experts", x=x, gate_up=gate_up, down=down)
    # On a GPU, its kernels do not wait to read the choices; elsewhere they are checked.
    choices = num_experts + num_zero_experts
    counts = _tokens_per_expert(expert_ids, choices) if expert_ids.is_cpu else None
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and limit is None and out_dtype == x.dtype:
        fast = triton.moe_experts(x, expert_ids, weights, gate_up, down, residual, num_zero_experts)
        if fast is not None:
            return fast
    counts = counts or _tokens_per_expert(expert_ids, choices)
    order = torch.argsort(expert_ids.reshape(-1), stable=True)
    sorted_x = x[order // expert_ids.shape[1]].split(counts)
    experts = zip(sorted_x[:num_experts], _matrices(gate_up), _matrices(down), strict=True)
    outputs = [_gated(tokens, into, out, limit) for tokens, into, out in experts if tokens.shape[0]]
    outputs += sorted_x[num_experts:]
    chosen = torch.cat(outputs)[torch.argsort(order)].view(*expert_ids.shape, -1)
    result = (chosen * weights.unsqueeze(-1)).sum(dim=1)
    return (result if residual is None else result + residual).to(out_dtype)


def gated_mlp(
    x: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    residual: Tensor | None = None,
    limit: SwigluLimit | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`down (silu(gate x) * up x) + residual` (SwiGLU, arXiv 2002.05202).

    The sum with the residual is rounded once; the kernels round the intermediate to x's dtype too. A token's result
    does not depend, bit for bit, on the other tokens or the number of threads.

    Args:
        x: [..., D] bfloat16 or float32.
        gate_up: one packed [2I, D]; the first I rows are the gate's.
        down: one packed [O, I].
        residual: [..., O] or None.
        limit: of the activation, see `silu_mul`.
        out_dtype: of the result; None is x's.

    Returns:
        [..., O].

    Raises:
        OpError: the shapes do not fit together.
    """
    outs = down.out_features
    if _sizes(gate_up) != (1, 2 * down.in_features, x.shape[-1]) or down.count != 1:
        raise OpError(
            f"gated_mlp takes one packed gate_up [2I, D] and down [O, I]; for x {list(x.shape)} these are "
            f"{list(_sizes(gate_up))} and {list(_sizes(down))}"
        )
    if residual is not None:
        require_shape("residual", residual, (*x.shape[:-1], outs))
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    rows_residual = residual if residual is None or x.ndim == 2 else residual.reshape(-1, outs)
    out_dtype = out_dtype or x.dtype
    out = native.gated_mlp(rows, gate_up, down, rows_residual, limit, out_dtype)
    if out is None:
        require_floats(x=x, residual=residual)
        out = _gated(rows, gate_up, down, limit)
        out = (out if rows_residual is None else out + rows_residual).to(out_dtype)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], outs)


def _require_experts(x: Tensor, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight) -> int:
    """Check the experts' shapes; return how many there are."""
    (num_experts, outer, inner), wide = _sizes(down), _sizes(gate_up)
    both = isinstance(gate_up, PackedWeight) == isinstance(down, PackedWeight)
    if not both or outer != x.shape[1] or wide != (num_experts, 2 * inner, outer):
        raise OpError(
            f"moe_experts takes gate_up [E, 2I, D] and down [E, D, I], both packed or neither; for x {list(x.shape)} "
            f"these are {list(wide)} and {[num_experts, outer, inner]}"
        )
    return num_experts


def _sizes(weight: Tensor | PackedWeight) -> tuple[int, ...]:
    if isinstance(weight, PackedWeight):
        return weight.count, weight.out_features, weight.in_features
    require_shape("experts", weight, (None, None, None))
    return tuple(weight.shape)


def _tokens_per_expert(expert_ids: Tensor, num_experts: int) -> list[int]:
    flat_ids = expert_ids.reshape(-1)
    for found in map(int, flat_ids.aminmax()):  # before `bincount`, which makes room for the largest
        if not 0 <= found < num_experts:
            native.raise_unknown_expert(found, num_experts)
    return torch.bincount(flat_ids, minlength=num_experts).tolist()


def _matrices(weight: Tensor | PackedWeight) -> list[Tensor | PackedWeight]:
    if isinstance(weight, PackedWeight):
        return [weight.matrix(e) for e in range(weight.count)]
    # unbind, not indexing: its gradient is one stack, where each indexed expert would fill a zero tensor of them all.
    return list(weight.unbind())


def _gated(x: Tensor, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight, limit: SwigluLimit | None) -> Tensor:
    """In the weights' dtype; packed: in float32 at least, the intermediate rounded to x's dtype as the kernels do."""
    if isinstance(gate_up, Tensor):
        return linear(silu_mul(linear(x, gate_up), limit), down)
    wide = torch.promote_types(x.dtype, torch.float32)
    inner = silu_mul(linear(x, gate_up, out_dtype=wide), limit).to(x.dtype)
    return linear(inner, down, out_dtype=wide)
