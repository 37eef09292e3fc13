"""Lightning attention: a matrix a head that forgets at a fixed pace, in place of a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_same_dtype, require_shape
from latentkv.ops.native import lightning as native
from latentkv.ops.recurrence import Memory, raise_unfit, require_memory, require_uses, run_in_slots


class LightningWeights(NamedTuple):
    """What turns a layer's projections into its recurrence: H heads of D dimensions, W = H D.

    Attributes:
        log_decay: [H] float32, the logarithm of what a token leaves of a head's matrix.
        query_norm: [D], of each head's query.
        key_norm: [D].
        output_norm: [W], of what the heads give, in groups.
        norm_eps: of these norms.
        num_groups: groups of W / num_groups numbers.
    """

    log_decay: Tensor
    query_norm: Tensor
    key_norm: Tensor
    output_norm: Tensor
    norm_eps: float
    num_groups: int


class LightningState(NamedTuple):
    """What S sequences remember, float32, read and written in place.

    Attributes:
        matrices: [S, H, D, D], a row for each channel of the key.
        waiting: [S, K, 2, W], keys and values of drafts that wait to be known for tokens, normed and turned.
    """

    matrices: Tensor
    waiting: Tensor


def lightning_attend(
    qkv: Tensor,
    output_gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: LightningWeights,
    state: LightningState,
    *,
    q_start: Tensor,
    stop: Tensor,
    slot_ids: Tensor,
    pending: Tensor,
    committed: Tensor,
) -> Tensor:
    """Lightning attention (arXiv 2401.04658, eq. 7) over the new tokens of B sequences, as Ling-2.5 has it.

    Per head, with q and k normed, their first R dimensions turned in halves, and q times D^-1/2:
    S <- exp(log_decay) S + k v^T;  o = S^T q, and the result is `norm(o) * sigmoid(output_gate)`, normed in groups over
    all heads. All of it is computed in float32. What a token gives and leaves does not depend, bit for bit, on where
    its sequence is cut into steps, on drafts, other sequences or the number of threads.

    What is done with the slots is what `kda.kda_attend` does.

    Args:
        qkv: [T, 3 W] projections of q, k and v, before the norms.
        output_gate: [T, W].
        cos: [T, R / 2] float32, R <= D.
        sin: [T, R / 2] float32.
        weights: of the layer.
        state: of all slots.
        q_start: [B + 1] int32; sequence b owns rows q_start[b] : q_start[b + 1].
        stop: [T] int32; 1 for the first token of a sequence.
        slot_ids: [B] int32, each another.
        pending: [B] int32.
        committed: [B] int32.

    Returns:
        [T, W] in qkv's dtype.

    Raises:
        OpError: shapes or dtypes do not fit together, or a number names what there is not.
    """
    _require_shapes(qkv, output_gate, cos, sin, weights, state)
    require_uses(len(qkv), q_start=q_start, stop=stop, slot_ids=slot_ids, pending=pending, committed=committed)
    indices = q_start, stop, slot_ids, pending, committed
    fast = native.lightning_attend(qkv, output_gate, cos, sin, weights, state, indices)
    if fast is not None:
        out, bad = fast
        if bad >= 0:
            raise_unfit(bad)
        return out
    out = torch.empty_like(output_gate)
    ready = [_make_ready(qkv[t : t + 1], cos[t : t + 1], sin[t : t + 1], weights) for t in range(len(qkv))]
    written = [torch.stack([k.flatten(1), v.flatten(1)], dim=1) for _, k, v in ready]
    decay = weights.log_decay.exp()[:, None, None]

    def step(kept: Memory, row: Memory, new: int | None) -> tuple[Tensor, Memory]:
        k, v = row[0][0].unflatten(-1, (len(decay), -1))
        matrix = decay * kept[0] + k[:, :, None] * v[:, None, :]
        if new is None:
            return k, (matrix,)
        o = (ready[new][0][0][:, None, :] @ matrix).flatten()[None]
        return _finish(o, output_gate[new : new + 1], weights), (matrix,)

    reads = torch.cat(written) if written else qkv.new_zeros(0, 2, output_gate.shape[1])
    return run_in_slots(step, (reads,), (state.matrices,), (state.waiting,), out, indices)


def lightning_whole(qkv: Tensor, output_gate: Tensor, cos: Tensor, sin: Tensor, weights: LightningWeights) -> Tensor:
    """The same over whole sequences without a state, differentiable.

    Args:
        qkv: [B, S, 3 W].
        output_gate: [B, S, W].
        cos: [1 or B, S, R / 2].
        sin: [1 or B, S, R / 2].
        weights: of the layer.

    Returns:
        [B, S, W] in qkv's dtype.

    Raises:
        OpError: as `lightning_attend`.
    """
    _require_weights(qkv, cos, weights)
    q, k, v = _make_ready(qkv, cos, sin, weights)
    decay = weights.log_decay.to(q.dtype).exp()[:, None, None]
    matrix, outputs = q.new_zeros(q.shape[0], *k.shape[2:], v.shape[-1]), list[Tensor]()
    for t in range(q.shape[1]):
        matrix = decay * matrix + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ matrix).flatten(1))
    o = torch.stack(outputs, dim=1) if outputs else torch.empty_like(output_gate, dtype=q.dtype)
    return _finish(o, output_gate, weights).to(qkv.dtype)


def _make_ready(qkv: Tensor, cos: Tensor, sin: Tensor, weights: LightningWeights) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [..., H, D] of qkv [..., 3 W] and angles [..., R / 2]."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).unflatten(-1, (3, weights.log_decay.shape[0], -1)).unbind(-3)
    cos, sin = cos.to(wide)[..., None, :], sin.to(wide)[..., None, :]
    q, k = (
        _turn(_norm(x, weights.norm_eps) * norm.to(wide), cos, sin)
        for x, norm in ((q, weights.query_norm), (k, weights.key_norm))
    )
    return q * q.shape[-1] ** -0.5, k, v


def _norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)


def _finish(o: Tensor, output_gate: Tensor, weights: LightningWeights) -> Tensor:
    """`norm(o) * sigmoid(output_gate)` of o [..., W]."""
    normed = _norm(o.unflatten(-1, (weights.num_groups, -1)), weights.norm_eps).flatten(-2)
    return normed * weights.output_norm.to(o.dtype) * output_gate.to(o.dtype).sigmoid()


def _require_shapes(
    qkv: Tensor, output_gate: Tensor, cos: Tensor, sin: Tensor, weights: LightningWeights, state: LightningState
) -> None:
    _require_weights(qkv, cos, weights)
    rows, (heads, dim) = qkv.shape[0], (weights.log_decay.shape[0], weights.query_norm.shape[0])
    require_shape("qkv", qkv, (rows, 3 * heads * dim))
    require_shape("output_gate", output_gate, (rows, heads * dim))
    require_same_dtype("lightning_attend", qkv=qkv, output_gate=output_gate)
    for name, angles in (("cos", cos), ("sin", sin)):
        require_shape(name, angles, (rows, cos.shape[-1]))
        require(angles.dtype in (torch.float32, torch.float64), f"{name} must be float32, not {angles.dtype}")
    slots, drafts = state.matrices.shape[0], state.waiting.shape[1]
    require_shape("matrices", state.matrices, (slots, heads, dim, dim))
    require_shape("waiting", state.waiting, (slots, drafts, 2, heads * dim))
    require_memory(**state._asdict())


def _require_weights(qkv: Tensor, cos: Tensor, weights: LightningWeights) -> None:
    norms = {name: getattr(weights, name) for name in ("query_norm", "key_norm", "output_norm")}
    require_floats(qkv=qkv, **norms)
    require_same_dtype("lightning attention", **norms)
    heads, dim = weights.log_decay.shape[0], weights.query_norm.shape[0]
    require_shape("key_norm", weights.key_norm, (dim,))
    require_shape("output_norm", weights.output_norm, (heads * dim,))
    groups, turned, dtype = weights.num_groups, 2 * cos.shape[-1], weights.log_decay.dtype
    require(groups > 0 and not heads * dim % groups, f"{groups} groups cannot share {heads * dim} numbers evenly")
    require(turned <= dim, f"{turned} rotary dimensions are more than the {dim} of a head")
    require(dtype in (torch.float32, torch.float64), f"log_decay must be float32, not {dtype}: its errors add up")
