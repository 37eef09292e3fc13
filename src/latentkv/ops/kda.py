"""Kimi Delta Attention: a matrix a head in place of a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.checks import require, require_floats, require_same_dtype, require_shape
from latentkv.ops.native import kda as native
from latentkv.ops.recurrence import Memory, raise_unfit, require_memory, require_uses, run_in_slots

TAPS = 4
"""Tokens that the short convolution reads, the newest included."""

_L2_EPS = 1e-6


class KDAWeights(NamedTuple):
    """What turns a layer's projections into its recurrence: H heads of D dimensions, W = H D.

    Attributes:
        taps: [4, 3 W] float32 of the convolution, the newest token's last; the channels of q, k and v.
        log_rate: [H] float32, the logarithm of how fast a head forgets (A_log).
        gate_bias: [W] float32, added to the forget gate (dt_bias).
        norm: [D], of each head's output.
        norm_eps: of that norm.
        lower_bound: of the logarithm of the decay, a factor of its sigmoid; None: minus a softplus, without bound.
    """

    taps: Tensor
    log_rate: Tensor
    gate_bias: Tensor
    norm: Tensor
    norm_eps: float
    lower_bound: float | None


class KDAState(NamedTuple):
    """What S sequences remember, float32, read and written in place.

    Attributes:
        matrices: [S, H, D, D], a row for each channel of the key.
        conv: [S, 3, 3 W], the last rows of qkv, the oldest first.
        pending_qkv: [S, K, 3 W], rows of drafts that wait to be known for tokens.
        pending_gate: [S, K, W], or [S, K, H, D], the same.
        pending_beta: [S, K, H], the same.
    """

    matrices: Tensor
    conv: Tensor
    pending_qkv: Tensor
    pending_gate: Tensor
    pending_beta: Tensor


def kda_attend(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    weights: KDAWeights,
    state: KDAState,
    *,
    q_start: Tensor,
    stop: Tensor,
    slot_ids: Tensor,
    pending: Tensor,
    committed: Tensor,
) -> Tensor:
    """Kimi Delta Attention over the new tokens of B sequences (arXiv 2510.26692, section 3), token by token.

    Per head, after a causal convolution of 4 tokens and silu, with q and k of length 1 and q times D^-1/2:
    S <- diag(exp g) S;  d = sigmoid(beta) (v - S^T k);  S <- S + k d^T;  o = S^T q, and the result is
    `norm(o) * sigmoid(output_gate)`. g = lower_bound sigmoid(exp(log_rate) (gate + gate_bias)), or without a bound
    -exp(log_rate) softplus(gate + gate_bias). All of it is computed in float32. What a token gives and leaves does not
    depend, bit for bit, on where its sequence is cut into steps, on drafts, other sequences or the number of threads.

    Sequence b takes the first pending[b] rows that wait in its slot into its state, then the first committed[b] of its
    own, and stores it; its other rows go on from there without a trace but that they wait in the slot from then on. A
    sequence whose first row has stop = 1 begins with it: its state is zero, whatever lies in the slot.

    Args:
        qkv: [T, 3 W] projections of q, k and v, before the convolution.
        gate: [T, W] of the forget gate.
        beta: [T, H].
        output_gate: [T, W].
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
    _require_shapes(qkv, gate, beta, output_gate, weights, state)
    require_uses(len(qkv), q_start=q_start, stop=stop, slot_ids=slot_ids, pending=pending, committed=committed)
    indices = q_start, stop, slot_ids, pending, committed
    fast = native.kda_attend(qkv, gate, beta, output_gate, weights, state, indices)
    if fast is not None:
        out, bad = fast
        if bad >= 0:
            raise_unfit(bad)
        return out

    def step(kept: Memory, row: Memory, new: int | None) -> tuple[Tensor, Memory]:
        matrix, past = kept
        rows, gates, betas = row
        window = torch.cat([past, rows])
        o, matrix = _recur(*_make_ready(window, gates.flatten(1), betas, weights), matrix)
        given = o if new is None else _finish(o, output_gate[new : new + 1], weights)
        return given, (matrix, window[1:])

    out = torch.empty_like(output_gate, dtype=qkv.dtype)
    return run_in_slots(step, (qkv, gate, beta), state[:2], state[2:], out, indices)


def kda_whole(qkv: Tensor, gate: Tensor, beta: Tensor, output_gate: Tensor, weights: KDAWeights) -> Tensor:
    """The same over whole sequences without a state, differentiable.

    Args:
        qkv: [B, S, 3 W].
        gate: [B, S, W].
        beta: [B, S, H].
        output_gate: [B, S, W].
        weights: of the layer.

    Returns:
        [B, S, W] in qkv's dtype.

    Raises:
        OpError: as `kda_attend`.
    """
    _require_weights(qkv, weights)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    past = qkv.new_zeros(qkv.shape[0], TAPS - 1, qkv.shape[2], dtype=wide)
    heads, dim = weights.log_rate.shape[0], weights.norm.shape[0]
    ready = _make_ready(torch.cat([past, qkv.to(wide)], dim=1), gate.to(wide), beta.to(wide), weights)
    o, _ = _recur(*ready, qkv.new_zeros(qkv.shape[0], heads, dim, dim, dtype=wide))
    return _finish(o, output_gate, weights).to(qkv.dtype)


def _make_ready(
    window: Tensor, gate: Tensor, beta: Tensor, weights: KDAWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, decay [..., T, H, D] and beta [..., T, H, 1] of window [..., 3 + T, 3 W], gate [..., T, W], beta."""
    rows, heads = gate.shape[-2], weights.log_rate.shape[0]
    inputs = [window[..., tap : tap + rows, :] * weights.taps[tap] for tap in range(TAPS)]
    convolved = functional.silu(inputs[0] + inputs[1] + inputs[2] + inputs[3])
    q, k, v = convolved.unflatten(-1, (3, heads, -1)).unbind(-3)
    q, k = (t * torch.rsqrt(t.square().sum(dim=-1, keepdim=True) + _L2_EPS) for t in (q, k))
    x = (gate + weights.gate_bias).unflatten(-1, (heads, -1))
    rate = weights.log_rate.exp()[:, None]
    if weights.lower_bound is None:
        log_decay = -rate * functional.softplus(x)
    else:
        log_decay = weights.lower_bound * torch.sigmoid(rate * x)
    return q * q.shape[-1] ** -0.5, k, v, log_decay.exp(), beta.sigmoid()[..., None]


def _recur(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """O [..., T, H, D], and the matrix [..., H, D, D] after the last token."""
    outputs: list[Tensor] = []
    for t in range(q.shape[-3]):
        matrix = decay[..., t, :, :, None] * matrix
        change = beta[..., t, :, :] * (v[..., t, :, :] - (k[..., t, :, None, :] @ matrix).squeeze(-2))
        matrix = matrix + k[..., t, :, :, None] * change[..., None, :]
        outputs.append((q[..., t, :, None, :] @ matrix).squeeze(-2))
    return torch.stack(outputs, dim=-3) if outputs else torch.empty_like(v), matrix


def _finish(o: Tensor, output_gate: Tensor, weights: KDAWeights) -> Tensor:
    """`norm(o) * sigmoid(output_gate)`, [..., H D]."""
    scale = torch.rsqrt(o.square().mean(dim=-1, keepdim=True) + weights.norm_eps)
    return (o * scale * weights.norm.to(o.dtype)).flatten(-2) * output_gate.to(o.dtype).sigmoid()


def _require_shapes(
    qkv: Tensor, gate: Tensor, beta: Tensor, output_gate: Tensor, weights: KDAWeights, state: KDAState
) -> None:
    _require_weights(qkv, weights)
    rows, (heads, dim) = qkv.shape[0], (weights.log_rate.shape[0], weights.norm.shape[0])
    width = heads * dim
    require_shape("qkv", qkv, (rows, 3 * width))
    require_shape("gate", gate, (rows, width))
    require_shape("beta", beta, (rows, heads))
    require_shape("output_gate", output_gate, (rows, width))
    require_same_dtype("kda_attend", qkv=qkv, gate=gate, beta=beta, output_gate=output_gate)
    slots = state.matrices.shape[0]
    drafts = state.pending_qkv.shape[1]
    require_shape("matrices", state.matrices, (slots, heads, dim, dim))
    require_shape("conv", state.conv, (slots, TAPS - 1, 3 * width))
    require_shape("pending_qkv", state.pending_qkv, (slots, drafts, 3 * width))
    require_shape("pending_gate", state.pending_gate.flatten(2), (slots, drafts, width))
    require_shape("pending_beta", state.pending_beta, (slots, drafts, heads))
    require_memory(**state._asdict())


def _require_weights(qkv: Tensor, weights: KDAWeights) -> None:
    require_floats(qkv=qkv, norm=weights.norm)
    heads, dim = weights.log_rate.shape[0], weights.norm.shape[0]
    require_shape("taps", weights.taps, (TAPS, 3 * heads * dim))
    require_shape("log_rate", weights.log_rate, (heads,))
    require_shape("gate_bias", weights.gate_bias, (heads * dim,))
    for name in ("taps", "log_rate", "gate_bias"):
        dtype = getattr(weights, name).dtype
        require(dtype in (torch.float32, torch.float64), f"{name} must be float32, not {dtype}: its errors add up")
