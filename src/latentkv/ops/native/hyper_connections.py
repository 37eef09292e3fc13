"""Hyper-connections on `csrc/hyper.cpp`; None where torch is to compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native import sparse
from latentkv.ops.native.eligible import isa_for

_MOST_STREAMS = 16  # csrc/hyper.h


def mix_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `hyper_connections.mix_streams`; all shapes fit. Pre, post and comb."""
    isa = isa_for(streams, fn, base, scale)
    if isa is None or not _fits(streams) or not all(_is_float32(t) for t in (fn, base, scale)):
        return None
    *rows, count, dim = streams.shape
    tokens = math.prod(rows)
    products = sparse.weigh_heads(streams.view(tokens, count * dim), fn, 1.0)
    if products is None:
        return None
    pre, post = (torch.empty((*rows, count), dtype=torch.float32) for _ in range(2))
    comb = torch.empty((*rows, count, count), dtype=torch.float32)
    extension.hyper_mix(
        isa,
        streams.data_ptr(),
        DTYPE_CODES[streams.dtype],
        products.data_ptr(),
        base.data_ptr(),
        scale.data_ptr(),
        norm_eps,
        eps,
        iterations,
        tokens,
        count,
        dim,
        pre.data_ptr(),
        post.data_ptr(),
        comb.data_ptr(),
    )
    return pre, post, comb


def collapse_streams(streams: Tensor, weights: Tensor | None) -> Tensor | None:
    """See `hyper_connections.collapse_streams`; all shapes fit."""
    isa = isa_for(streams) if weights is None else isa_for(streams, weights)
    if isa is None or not _fits(streams) or not (weights is None or _is_float32(weights)):
        return None
    *rows, count, dim = streams.shape
    out = streams.new_empty((*rows, dim))
    given = 0 if weights is None else weights.data_ptr()
    places = streams.data_ptr(), DTYPE_CODES[streams.dtype], given, out.data_ptr()
    extension.collapse_streams(isa, *places, math.prod(rows), count, dim)
    return out


def expand_streams(streams: Tensor, block: Tensor, post: Tensor, comb: Tensor | None) -> Tensor | None:
    """See `hyper_connections.expand_streams`; all shapes fit."""
    isa = isa_for(streams, block, post) if comb is None else isa_for(streams, block, post, comb)
    if isa is None or not _fits(streams) or not all(_is_float32(t) for t in (post, comb) if t is not None):
        return None
    if block.dtype is not streams.dtype or not block.is_contiguous():
        return None
    *rows, count, dim = streams.shape
    out = torch.empty_like(streams)
    extension.expand_streams(
        isa,
        streams.data_ptr(),
        DTYPE_CODES[streams.dtype],
        block.data_ptr(),
        dim,
        post.data_ptr(),
        0 if comb is None else comb.data_ptr(),
        out.data_ptr(),
        math.prod(rows),
        count,
        dim,
    )
    return out


def _fits(streams: Tensor) -> bool:
    """Whether these are streams that the kernels take."""
    return streams.is_contiguous() and 0 < streams.shape[-2] <= _MOST_STREAMS and streams.shape[-1] > 0


def _is_float32(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_contiguous()
