"""Sparse attention's indexer on the C++ kernels: tensors to addresses. What is not theirs, torch computes."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import as_int32
from latentkv.errors import OpError
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.native.eligible import isa_for
from latentkv.ops.native.pages import raise_slot_outside

_FORMATS = {**DTYPE_CODES, torch.int8: 3}
"""How keys are stored, as `csrc/dtypes.h` numbers the formats of rows."""

_LARGEST_DIM = 1024  # csrc/index.h
_LARGEST_POOL = 64  # csrc/cache_write.h


def write_index_keys(
    key_pages: Tensor,
    slots: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
) -> bool:
    """See `index_keys.write_index_keys`; whether it wrote."""
    isa = isa_for(k, weight, bias, cos, sin)
    if isa is None or k.ndim != 2 or cos.ndim != 2 or not _holds_keys(key_pages, k.shape[1]):
        return False
    (tokens, dim), half = k.shape, cos.shape[1]
    if (
        2 * half > dim
        or k.stride(1) != 1
        or weight.shape != (dim,)
        or bias.shape != (dim,)
        or weight.dtype is not bias.dtype
        or cos.shape != (tokens, half)
        or sin.shape != (tokens, half)
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
        or not all(t.is_contiguous() for t in (weight, bias, cos, sin, slots))
        or slots.dtype is not torch.int64
        or slots.shape != (tokens,)
        or not slots.is_cpu
    ):
        return False
    bad = extension.write_index_keys(
        isa,
        key_pages.data_ptr(),
        slots.data_ptr(),
        key_pages.shape[2] * key_pages.dtype.itemsize,
        key_pages.shape[0] * key_pages.shape[1],
        _FORMATS[key_pages.dtype],
        tokens,
        dim,
        2 * half,
        k.data_ptr(),
        k.stride(0),
        DTYPE_CODES[k.dtype],
        weight.data_ptr(),
        bias.data_ptr(),
        DTYPE_CODES[weight.dtype],
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
    )
    if bad >= 0:
        raise_slot_outside(int(slots[bad]), key_pages)
    return True


def write_pooled_keys(
    key_pages: Tensor,
    rings: Tensor,
    slots: Tensor,
    k: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ape: Tensor,
) -> bool:
    """See `index_keys.write_pooled_keys`; whether it wrote."""
    isa = isa_for(k, gate, weight, bias, ape, rings)
    if isa is None or k.ndim != 2 or ape.ndim != 2 or rings.ndim != 3 or not _holds_keys(key_pages, k.shape[1]):
        return False
    (tokens, dim), pool, ring = k.shape, ape.shape[0], rings.shape[1]
    if (
        gate.shape != k.shape
        or gate.dtype is not k.dtype
        or k.stride(1) != 1
        or gate.stride(1) != 1
        or weight.shape != (dim,)
        or bias.shape != (dim,)
        or weight.dtype is not bias.dtype
        or ape.shape[1] != dim
        or ape.dtype is not torch.float32
        or rings.shape[0] != key_pages.shape[0]
        or rings.shape[2] != 2 * dim
        or not 0 < pool <= min(ring, _LARGEST_POOL)
        or not all(t.is_contiguous() for t in (weight, bias, ape, rings, slots))
        or slots.dtype is not torch.int64
        or slots.shape != (tokens,)
        or not slots.is_cpu
    ):
        return False
    page_size = key_pages.shape[1] * pool
    bad = extension.write_pooled_keys(
        isa,
        key_pages.data_ptr(),
        rings.data_ptr(),
        DTYPE_CODES[rings.dtype],
        ring,
        slots.data_ptr(),
        key_pages.shape[2] * key_pages.dtype.itemsize,
        key_pages.shape[0] * page_size,
        page_size,
        pool,
        _FORMATS[key_pages.dtype],
        tokens,
        dim,
        k.data_ptr(),
        k.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        DTYPE_CODES[k.dtype],
        weight.data_ptr(),
        bias.data_ptr(),
        DTYPE_CODES[weight.dtype],
        eps,
        ape.data_ptr(),
    )
    if bad >= 0:
        raise OpError(f"slot {int(slots[bad])} is not one of the cache's {key_pages.shape[0] * page_size} token slots")
    return True


def weigh_heads(x: Tensor, weight: Tensor, scale: float) -> Tensor | None:
    """See `sparse.weigh_heads`."""
    isa = isa_for(x, weight)
    if isa is None or x.ndim != 2 or x.stride(1) != 1:
        return None
    if weight.dtype is not torch.float32 or weight.shape[1:] != x.shape[1:] or not weight.is_contiguous():
        return None
    (tokens, dim), heads = x.shape, weight.shape[0]
    out = torch.empty((tokens, heads), dtype=torch.float32)
    extension.weigh_heads(
        isa,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        weight.data_ptr(),
        scale,
        out.data_ptr(),
        tokens,
        dim,
        heads,
    )
    return out


def select_slots(
    q: Tensor,
    weights: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    start: Tensor | None,
    stop: Tensor,
    topk: int,
    pool: int,
    open_pool: bool,
) -> Tensor | None:
    """See `sparse.select_slots`, which has checked shapes.

    Raises:
        OpError: q_start does not fit, or the pages do not cover what is seen.
    """
    isa = isa_for(q, weights)
    rows, heads, dim = q.shape
    if isa is None or weights.dtype is not torch.float32 or not _holds_keys(key_pages, dim):
        return None
    numbers = [block_table, q_start, stop, *([] if start is None else [start])]
    if q.stride(2) != 1 or weights.stride(1) != 1 or not all(t.is_cpu for t in numbers):
        return None
    table, bounds, ends, *begins = (as_int32(t) for t in numbers)
    if table is None or bounds is None or ends is None or None in begins:
        return None
    slots = torch.empty((rows, topk + (pool - 1 if open_pool else 0)), dtype=torch.int32)
    try:
        extension.select_slots(
            isa,
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            DTYPE_CODES[q.dtype],
            weights.data_ptr(),
            weights.stride(0),
            key_pages.data_ptr(),
            _FORMATS[key_pages.dtype],
            key_pages.shape[2] * key_pages.dtype.itemsize,
            key_pages.shape[0],
            key_pages.shape[1] * pool,
            table.data_ptr(),
            table.stride(0),
            table.shape[1],
            table.shape[0],
            bounds.data_ptr(),
            begins[0].data_ptr() if begins and begins[0] is not None else 0,
            ends.data_ptr(),
            rows,
            heads,
            dim,
            topk // pool,
            pool,
            open_pool,
            slots.data_ptr(),
        )
    except ValueError as error:
        raise OpError(str(error)) from None
    return slots


def _holds_keys(key_pages: Tensor, dim: int) -> bool:
    """Whether these are pages of keys of `dim` numbers that the kernels read."""
    dtype = key_pages.dtype
    if dtype not in _FORMATS or not key_pages.is_cpu or key_pages.ndim != 3 or not key_pages.is_contiguous():
        return False
    width = dim + 4 if dtype is torch.int8 else dim
    return 0 < dim <= _LARGEST_DIM and key_pages.shape[2] == width
