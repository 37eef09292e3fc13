"""The small keys by which sparse attention selects tokens (DeepSeek-V3.2, arXiv 2512.02556): written, stored, read.

They are stored as floats, or as int8: a key times the orthogonal Hadamard matrix, which spreads what stands out over
all its numbers and changes no product of two vectors that are both rotated so, as 8-bit codes with one float32 scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.checks import require, require_floats, require_integers, require_shape
from latentkv.errors import OpError
from latentkv.ops.elementwise import apply_rope
from latentkv.ops.native import sparse as native

SCALE_BYTES = 4
"""Of a stored key's float32 scale, after its int8 codes."""


def write_index_keys(
    key_pages: Tensor,
    slots: Tensor,
    k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Norm T tokens' index keys (layer norm, arXiv 1607.06450), rotate their first dimensions and store them.

    Args:
        key_pages: [N, P, D], or [N, P, D + 4] int8; changed in place.
        slots: [T] int64, page * P + offset of each token, all different.
        k: [T, D] projected keys.
        norm_weight: [D].
        norm_bias: [D].
        eps: of the norm.
        cos: [T, R/2] float32; the first R numbers of a key are rotated.
        sin: like cos.
        interleaved: see `apply_rope`.

    Raises:
        OpError: shapes or dtypes do not fit, or a slot lies outside the cache.
    """
    if native.write_index_keys(key_pages, slots, k, norm_weight, norm_bias, eps, cos, sin, interleaved=interleaved):
        return
    require_shape("k", k, (None, None))
    tokens, dim = k.shape
    check_key_pages(key_pages, dim)
    require_floats(k=k, norm_weight=norm_weight, norm_bias=norm_bias, cos=cos, sin=sin)
    require_integers("slots", slots)
    require_shape("slots", slots, (tokens,))
    require_shape("cos", cos, (tokens, None))
    size = key_pages.shape[0] * key_pages.shape[1]
    outside = ((slots < 0) | (slots >= size)) if slots.is_cpu else slots[:0]
    if bool(outside.any()):
        raise OpError(f"slot {int(slots[outside][0])} is not one of the cache's {size} token slots")
    keys = rotate_first(functional.layer_norm(k, (dim,), norm_weight, norm_bias, eps), cos, sin, interleaved)
    rows = encode_keys(keys) if key_pages.dtype == torch.int8 else keys.to(key_pages.dtype)
    key_pages.view(-1, key_pages.shape[2]).index_copy_(0, slots.long(), rows)


def check_key_pages(key_pages: Tensor, dim: int) -> None:
    """Raise `OpError` unless these can be pages of keys of `dim` numbers."""
    quantised = key_pages.dtype == torch.int8
    require_shape("key_pages", key_pages, (None, None, dim + SCALE_BYTES if quantised else dim))
    require(key_pages.is_contiguous(), f"key_pages must be contiguous, not with strides {key_pages.stride()}")
    if quantised:
        require(can_be_int8(dim), f"index keys of {dim} numbers cannot be int8: their number must be a power of two")
    else:
        require_floats(key_pages=key_pages)


def can_be_int8(dim: int) -> bool:
    """Whether keys of `dim` numbers can be stored as int8: the rotation before takes a power of two, 4 or more."""
    return dim >= 4 and dim & (dim - 1) == 0


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first R dimensions of x [..., D] rotated; cos and sin broadcast against [..., R/2]."""
    width = 2 * cos.shape[-1]
    return torch.cat([apply_rope(x[..., :width], cos, sin, interleaved=interleaved), x[..., width:]], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Rows x [..., D] times the orthogonal Hadamard matrix of D, a power of two; float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide @ _hadamard_matrix(x.shape[-1], wide.dtype, wide.device)


def encode_keys(keys: Tensor) -> Tensor:
    """Rotated keys [T, D] as int8 rows [T, D + 4]; a key that is not finite gets the scale infinity."""
    turned = hadamard(keys).float()
    largest = turned.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    scales = torch.where(finite, largest / 127, torch.inf)
    codes = torch.where(finite & (scales > 0), turned / scales, 0.0).round().nan_to_num().to(torch.int8)
    return torch.cat([codes, scales.view(torch.int8)], dim=-1)


def decode_keys(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored keys [n, D] as numbers of `dtype`; those of int8 rows [n, D + 4] are still rotated by `hadamard`."""
    if rows.dtype != torch.int8:
        return rows.to(dtype, copy=True)
    scales = rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[:, :-SCALE_BYTES].to(dtype) * scales.to(dtype)


@cache
def _hadamard_matrix(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * dim**-0.5
