"""Hyper-connections (arXiv 2409.19606): n residual streams a token, which each block reads as one and writes to all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.checks import require, require_floats, require_shape
from latentkv.ops.elementwise import gate_heads, rms_norm
from latentkv.ops.native import hyper_connections as native
from latentkv.ops.native import sparse


class StreamMix(NamedTuple):
    """How each token's n streams are read by a block, and take in what it gives; float32 at least.

    Attributes:
        pre: [..., n], what each stream counts in what the block reads.
        post: [..., n], what the block's result counts in each stream.
        comb: [..., n, n], what each stream (first) counts in each stream after the block; None: streams stay.
    """

    pre: Tensor
    post: Tensor
    comb: Tensor | None


def mix_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> StreamMix:
    """The mix of manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

    Of m = fn f, f the streams of a token side by side, divided by the root of their mean square:
    pre = sigmoid(m[:n] scale[0] + base[:n]) + eps, post = 2 sigmoid(m[n:2n] scale[1] + base[n:2n]), and comb, the
    rows of softmax(m[2n:] scale[2] + base[2n:]) + eps, is made doubly stochastic (Sinkhorn and Knopp): its columns
    are divided by their sums + eps, then `iterations` - 1 times its rows and its columns.

    Args:
        streams: [..., n, D].
        fn: [(2 + n) n, n D] float32.
        base: [(2 + n) n] float32.
        scale: [3] float32.
        norm_eps: added to the mean square.
        eps: see above.
        iterations: 1 or more.

    Returns:
        In float32, of float64 streams in float64. Where the kernels compute, a token's mix depends on its streams
        alone, bit for bit; so does what the other two functions give.

    Raises:
        OpError: shapes or dtypes do not fit.
    """
    count, dim = streams.shape[-2:]
    rows = (2 + count) * count
    require_shape("fn", fn, (rows, count * dim))
    require_shape("base", base, (rows,))
    require_shape("scale", scale, (3,))
    require_floats(streams=streams, fn=fn, base=base, scale=scale)
    require(iterations > 0, f"mix_streams makes its matrix stochastic once or more, not {iterations} times")
    fast = native.mix_streams(streams, fn, base, scale, norm_eps, eps, iterations)
    if fast is not None:
        return StreamMix(*fast)
    wide = torch.promote_types(streams.dtype, torch.float32)
    flat = streams.flatten(-2).to(wide)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    with torch.autocast(streams.device.type, enabled=False):
        m = functional.linear(normed, fn.to(wide))
    sizes = [count, count, count * count]
    pre, post, comb = (
        part * factor + shift
        for part, factor, shift in zip(m.split(sizes, -1), scale.to(wide), base.split(sizes), strict=True)
    )
    comb = comb.unflatten(-1, (count, count)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return StreamMix(pre.sigmoid() + eps, 2 * post.sigmoid(), comb)


def gate_streams(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    norm_eps: float,
    eps: float,
    magnitude: float = 1.0,
) -> tuple[Tensor, ...]:
    """What independent hyper-connections (iHC, Hy4) read streams by, and write them by: a sigmoid for each stream.

    Of m = fn f, f as in `mix_streams`: sigmoid(m[:n] scale[0] + base[:n]) + eps, and where there is a second scale
    magnitude * sigmoid(m[n:] scale[1] + base[n:]) + eps.

    Args:
        streams: [..., n, D].
        fn: [g n, n D] float32.
        base: [g n] float32.
        scale: [g] float32, g being 1 or 2.
        norm_eps: added to the mean square.
        eps: see above.
        magnitude: see above.

    Returns:
        g tensors [..., n] in float32, of float64 streams in float64. Where the kernels compute, those of a token depend
        on its streams alone, bit for bit.

    Raises:
        OpError: shapes or dtypes do not fit.
    """
    count, dim = streams.shape[-2:]
    groups = scale.shape[0]
    require(groups in (1, 2), f"gate_streams takes one scale or two, not {groups}")
    require_shape("fn", fn, (groups * count, count * dim))
    require_shape("base", base, (groups * count,))
    require_floats(streams=streams, fn=fn, base=base, scale=scale)
    wide = torch.promote_types(streams.dtype, torch.float32)
    flat = streams.flatten(-2).to(wide)
    # Each by what depends on its own row alone: an op of torch may round it otherwise in another place.
    normed = rms_norm(flat, flat.new_ones(count * dim), norm_eps)
    m = sparse.weigh_heads(normed.view(-1, count * dim), fn.to(wide), 1.0)
    if m is None:
        with torch.autocast(streams.device.type, enabled=False):
            m = functional.linear(normed, fn.to(wide))
    m = m.view(-1, groups, count) * scale.to(wide).unsqueeze(-1) + base.to(wide).view(groups, count)
    most = m.new_ones(m.shape)
    most[:, 1:] = magnitude
    gates = (gate_heads(most, m) + eps).transpose(0, 1).contiguous()
    return tuple(gate.view(streams.shape[:-1]) for gate in gates)


def collapse_streams(streams: Tensor, weights: Tensor | None = None) -> Tensor:
    """`sum_i weights[i] streams[i]`, what a block reads of the streams; without weights their mean.

    Args:
        streams: [..., n, D].
        weights: [..., n] float32.

    Returns:
        [..., D] in the streams' dtype, summed in float32 at least.

    Raises:
        OpError: shapes do not fit.
    """
    if weights is not None:
        require_shape("weights", weights, tuple(streams.shape[:-1]))
    fast = native.collapse_streams(streams, weights)
    if fast is not None:
        return fast
    require_floats(streams=streams, weights=weights)
    wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
    return (wide.mean(-2) if weights is None else (wide * weights.unsqueeze(-1)).sum(-2)).to(streams.dtype)


def expand_streams(streams: Tensor, block: Tensor, mix: StreamMix) -> Tensor:
    """The streams after a block: stream k is `post[k] block + sum_j comb[j, k] streams[j]`.

    Args:
        streams: [..., n, D], before it.
        block: [..., D], what it gives.
        mix: of the streams; without a comb they stay as they are and are added to.

    Returns:
        [..., n, D] in the streams' dtype, summed in float32 at least.

    Raises:
        OpError: shapes do not fit.
    """
    *rows, count, dim = streams.shape
    require_shape("block", block, (*rows, dim))
    require_shape("post", mix.post, (*rows, count))
    if mix.comb is not None:
        require_shape("comb", mix.comb, (*rows, count, count))
    fast = native.expand_streams(streams, block, mix.post, mix.comb)
    if fast is not None:
        return fast
    require_floats(streams=streams, block=block, post=mix.post, comb=mix.comb)
    wide = torch.promote_types(streams.dtype, torch.float32)
    kept = streams.to(wide)
    if mix.comb is not None:
        kept = mix.comb.transpose(-1, -2) @ kept
    return (mix.post.unsqueeze(-1) * block.to(wide).unsqueeze(-2) + kept).to(streams.dtype)
