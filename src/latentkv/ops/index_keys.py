"""The small keys by which sparse attention selects tokens (DeepSeek-V3.2, arXiv 2512.02556): written, stored, read.

Where pools of tokens are selected (GLM-5.3-Flash), a pool has one key, and the keys of the tokens of a pool that is not
whole yet wait in a ring.

They are stored as floats, or as int8: a key times the orthogonal Hadamard matrix, which spreads what stands out over
all its numbers and changes no product of two vectors that are both rotated so, as 8-bit codes with one float32 scale.
"""

from __future__ import annotations

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
    _require_inside(slots, key_pages.shape[0] * key_pages.shape[1])
    normed = functional.layer_norm(k.to(norm_weight.dtype), (dim,), norm_weight, norm_bias, eps).to(k.dtype)
    keys = rotate_first(normed, cos, sin, interleaved)
    _store(key_pages, slots.long(), keys)


def write_pooled_keys(
    key_pages: Tensor,
    rings: Tensor,
    slots: Tensor,
    k: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    ape: Tensor,
) -> None:
    """Norm T tokens' index keys, and store the keys of the pools that end with one of them (GLM-5.3-Flash).

    Each G tokens of a page are a pool. Its key is the mean of theirs, weighted number by number by the softmax of their
    gates + ape, from what the page's ring keeps: a token's key and gate lie there at its offset in the page modulo the
    ring's length. So a pool's key does not depend on how its tokens were cut into steps, bit for bit. As many tokens as
    the ring is longer than a pool may be written and then replaced: a draft leaves no trace.

    Args:
        key_pages: [N, P / G, D], or [N, P / G, D + 4] int8; changed in place.
        rings: [N, ring, 2 D] floats; changed in place. A ring is as long as a pool, or longer.
        slots: [T] int64, page * P + offset of each token, all different; a page's are next to each other, in order.
        k: [T, D] projected keys.
        gate: [T, D].
        norm_weight: [D].
        norm_bias: [D].
        eps: of the norm.
        ape: [G, D] float32, of a pool's tokens.

    Raises:
        OpError: shapes or dtypes do not fit, or a slot lies outside the cache.
    """
    arguments = key_pages, rings, slots, k, gate, norm_weight, norm_bias, eps, ape
    if native.write_pooled_keys(*arguments):
        return
    require_shape("k", k, (None, None))
    (tokens, dim), pool = k.shape, ape.shape[0]
    check_key_pages(key_pages, dim)
    pages, page_size = key_pages.shape[0], key_pages.shape[1] * pool
    require_floats(k=k, gate=gate, norm_weight=norm_weight, norm_bias=norm_bias, ape=ape, rings=rings)
    require_shape("gate", gate, (tokens, dim))
    require_shape("ape", ape, (None, dim))
    require_shape("rings", rings, (pages, None, 2 * dim))
    require(rings.shape[1] >= pool, f"a ring of {rings.shape[1]} tokens does not hold a pool of {pool}")
    require_integers("slots", slots)
    require_shape("slots", slots, (tokens,))
    _require_inside(slots, pages * page_size)
    keys = functional.layer_norm(k, (dim,), norm_weight, norm_bias, eps)
    rows, slots, ring = torch.cat([keys, gate], dim=-1).to(rings.dtype), slots.long(), rings.shape[1]
    waiting = rings.view(-1, 2 * dim)
    ends = (slots % pool == pool - 1).nonzero()[:, 0]
    # A pool's tokens are rows of this step, or wait in the ring.
    before = torch.arange(pool - 1, -1, -1, device=slots.device)
    members, places = (ends[:, None] - before).clamp(min=0), slots[ends][:, None] - before
    is_new = (slots[members] == places).unsqueeze(-1)
    stored = torch.where(is_new, rows[members], waiting[_ring_places(places, ring, page_size)])
    stored = stored.to(torch.promote_types(rings.dtype, torch.float32))
    if len(ends):
        _store(key_pages, slots[ends] // pool, pool_keys(stored[..., :dim], stored[..., dim:], ape))
    # Of the rows that would lie in one place the last stays.
    after = slots + ring
    later = (torch.arange(tokens, device=slots.device) + ring).clamp(max=tokens - 1)
    stays = (slots[later] != after) | (after // page_size != slots // page_size)
    waiting.index_copy_(0, _ring_places(slots[stays], ring, page_size), rows[stays])


def pool_keys(keys: Tensor, gates: Tensor, ape: Tensor) -> Tensor:
    """The keys [..., D] of pools of G tokens: the mean of theirs, weighted by the softmax of gates + ape.

    Args:
        keys: [..., G, D].
        gates: [..., G, D]; each number has a softmax of its own over the tokens.
        ape: [G, D].
    """
    return ((gates + ape).softmax(dim=-2) * keys).sum(dim=-2)


def _ring_places(slots: Tensor, ring: int, page_size: int) -> Tensor:
    """Where what waits of tokens lies, of all pages' rings one after the other."""
    return slots // page_size * ring + slots % page_size % ring


def _require_inside(slots: Tensor, size: int) -> None:
    outside = ((slots < 0) | (slots >= size)) if slots.is_cpu else slots[:0]
    if bool(outside.any()):
        raise OpError(f"slot {int(slots[outside][0])} is not one of the cache's {size} token slots")


def _store(key_pages: Tensor, places: Tensor, keys: Tensor) -> None:
    """Keys [n, D] into pages, one at each place."""
    rows = encode_keys(keys) if key_pages.dtype == torch.int8 else keys.to(key_pages.dtype)
    key_pages.view(-1, key_pages.shape[2]).index_copy_(0, places, rows)


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
    """Rows x [..., D] times the orthogonal Hadamard matrix of D, a power of two; float32 at least.

    By sums and differences, for a library's product may round a row otherwise where there are more rows.
    """
    wide, dim, half = x if x.dtype == torch.float64 else x.float(), x.shape[-1], 1
    while half < dim:
        first, second = wide.unflatten(-1, (-1, 2, half)).unbind(-2)
        wide = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return wide * dim**-0.5


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
