"""The small ops around attention, row by row: normalisation, rotary embedding and the gated activation."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import require_floats, require_shape
from latentkv.errors import OpError
from latentkv.ops.native import elementwise as native
from latentkv.ops.swiglu_limit import SwigluLimit
from latentkv.ops.triton import calls as triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (arXiv 1910.07467).

    The mean is taken in float32 (float64 for float64 x); the normed x is rounded to x.dtype before the weight is
    applied, as published checkpoints were trained. Returns x's shape and dtype.

    Raises:
        OpError: weight is not [D].
    """
    fast = native.rms_norm(x, weight, eps)
    if fast is not None:
        return fast
    require_floats(x=x, weight=weight)
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise OpError(f"rms_norm takes weight [{x.shape[-1]}] for x {list(x.shape)}, not {list(weight.shape)}")
    fast = triton.rms_norm(x, weight, eps)
    if fast is not None:
        return fast
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def norm_beside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[rms_norm(x) ; x]`: x [..., D] -> [..., 2D] in its dtype.

    Raises:
        OpError: weight is not [D].
    """
    fast = native.norm_beside(x, weight, eps)
    return torch.cat([rms_norm(x, weight, eps), x], dim=-1) if fast is None else fast


def gated_rms_norm(x: Tensor, weight: Tensor, eps: float, down: Tensor, up: Tensor) -> Tensor:
    """`y * sigmoid(up silu(down y))` of `y = rms_norm(x)`: a norm that gates itself (A.X-K2).

    Args:
        x: [..., D].
        weight: [D], of the norm.
        eps: of the norm.
        down: [rank, D].
        up: [D, rank].

    Returns:
        x's shape and dtype; the gate is a sigmoid in float32 at least.

    Raises:
        OpError: the weights do not fit x.
    """
    dim, rank = x.shape[-1], down.shape[0]
    if down.shape != (rank, dim) or up.shape != (dim, rank) or weight.shape != (dim,):
        raise OpError(
            f"gated_rms_norm takes weight [{dim}], down [rank, {dim}] and up [{dim}, rank] for x {list(x.shape)}, not "
            f"{list(weight.shape)}, {list(down.shape)} and {list(up.shape)}"
        )
    fast = native.gated_rms_norm(x, weight, eps, down, up)
    if fast is not None:
        return fast
    y = rms_norm(x, weight, eps)
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(y, down))
    gate = torch.nn.functional.linear(hidden, up)
    return (y * gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid()).to(y.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, out: Tensor | None = None) -> Tensor:
    """Rotate pairs of dimensions by each token's angles (RoFormer, arXiv 2104.09864).

    Args:
        x: [..., R], any float dtype.
        cos: broadcasts against [..., R/2]: [T, R/2] for keys [T, R], [T, 1, R/2] for heads [T, H, R].
        sin: like cos.
        interleaved: pairs are dimensions (0, 1), (2, 3), ...; otherwise (0, R/2), (1, R/2 + 1), ...
        out: where to write, of x's shape and dtype: x itself or a slice of a wider tensor; None = a new tensor.

    Returns:
        x's shape, dtype and order of dimensions; computed in the wider of x's and cos's dtype.

    Raises:
        OpError: R is odd, or cos and sin or out do not fit x.
    """
    fast = native.apply_rope(x, cos, sin, interleaved=interleaved, out=out)
    if fast is not None:
        return fast
    require_floats(x=x, cos=cos, sin=sin)
    half = x.shape[-1] // 2
    if x.shape[-1] != 2 * half or cos.shape != sin.shape or not _angles_fit(x, cos, half):
        raise OpError(
            f"apply_rope takes x [..., R] with even R, and cos and sin that broadcast against [..., R/2]; these are "
            f"{list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise OpError(f"out must be {list(x.shape)} of {x.dtype} like x, not {list(out.shape)} of {out.dtype}")
    fast = triton.apply_rope(x, cos, sin, interleaved=interleaved, out=out)
    if fast is not None:
        return fast
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    rotated = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x.dtype) if out is None else out.copy_(joined)


def _angles_fit(x: Tensor, cos: Tensor, half: int) -> bool:
    sizes, angles = x.shape[:-1], cos.shape[:-1]
    return (
        cos.shape[-1] == half
        and len(angles) <= len(sizes)
        and all(c in (1, n) for c, n in zip(reversed(angles), reversed(sizes), strict=False))
    )


def gate_heads(x: Tensor, gate: Tensor) -> Tensor:
    """`x * sigmoid(gate)`: what heads give, gated before the output projection (Ling-3.0).

    Args:
        x: [..., H, D].
        gate: [..., H], one for each head, or [..., H D] or [..., H, D], one for each number.

    Returns:
        [..., H, D] in x's dtype, computed in float32 at least; x itself, changed, where the kernels compute it.

    Raises:
        OpError: the shapes do not fit.
    """
    *rows, heads, dim = x.shape
    if list(gate.shape) not in ([*rows, heads], [*rows, heads * dim], [*rows, heads, dim]):
        raise OpError(
            f"gate_heads takes x [..., H, D] and gate [..., H], [..., H D] or [..., H, D]; these are {list(x.shape)} "
            f"and {list(gate.shape)}"
        )
    fast = native.gate_heads(x, gate)
    if fast is not None:
        return fast
    require_floats(x=x, gate=gate)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = gate if gate.ndim == x.ndim else gate.unflatten(-1, (heads, -1))
    return (x.to(wide) * gate.to(wide).sigmoid()).to(x.dtype)


def sink_heads(x: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`x * sigmoid(lse - sink)`: what heads give, had each one more token to read, of score `sink` and without a value.

    That token only adds exp(sink) to what the softmax divides by (a learned sink: arXiv 2309.17453, section 3.3; Hy4).

    Args:
        x: [..., H, D].
        lse: [..., H], natural log of sum exp(score) of what was read.
        sinks: [H].

    Returns:
        [..., H, D] in x's dtype, computed in float32 at least; x itself, changed, where the kernels compute it.

    Raises:
        OpError: the shapes do not fit.
    """
    require_shape("lse", lse, tuple(x.shape[:-1]))
    require_shape("sinks", sinks, (x.shape[-2],))
    return gate_heads(x, lse - sinks)


def silu_mul(gate_up: Tensor, limit: SwigluLimit | None = None) -> Tensor:
    """`silu(gate) * up` of gate_up [..., 2I], the gate first -> [..., I] in its dtype (SwiGLU, arXiv 2002.05202).

    Args:
        gate_up: both, side by side.
        limit: l: min(silu(gate), l) * clamp(up, -l, l), or silu(min(gate, l)) in front; None: no limit.

    Raises:
        OpError: the last dimension is odd.
    """
    fast = native.silu_mul(gate_up) if limit is None else None
    if fast is not None:
        return fast
    require_floats(gate_up=gate_up)
    if gate_up.shape[-1] % 2:
        raise OpError(f"silu_mul takes gate and up of one width side by side, not {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return torch.nn.functional.silu(gate) * up
    most, up = limit.value, up.clamp(-limit.value, limit.value)
    if limit.bounds_gate:
        return torch.nn.functional.silu(gate.clamp(max=most)) * up
    return torch.nn.functional.silu(gate).clamp(max=most) * up
