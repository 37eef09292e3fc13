"""Writing the latent cache on the C++ kernels. Each returns whether it wrote; where not, torch checks and writes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.kv_formats import KV_FORMATS, KVFormat, latent_payload_bytes, storage_dtype
from latentkv.ops.native.elementwise import MAX_ROW
from latentkv.ops.native.eligible import isa_for


def write_latents(kv_pages: Tensor, slots: Tensor, latents: Tensor, k_rope: Tensor, kv_format: KVFormat | None) -> bool:
    """See `pages.write_latents`."""
    isa = isa_for(latents, k_rope)
    if isa is None or latents.ndim != 2 or k_rope.ndim != 2:
        return False
    (tokens, latent_dim), (rope_tokens, rope_dim) = latents.shape, k_rope.shape
    latents_strides, k_rope_strides = latents.stride(), k_rope.stride()
    place = _place(kv_pages, slots, tokens, latent_dim, rope_dim, kv_format)
    if place is None or rope_tokens != tokens or latents_strides[1] != 1 or k_rope_strides[1] != 1:
        return False
    bad = extension.write_latents(
        isa,
        *place,
        latents.data_ptr(),
        latents_strides[0],
        DTYPE_CODES[latents.dtype],
        k_rope.data_ptr(),
        k_rope_strides[0],
        DTYPE_CODES[k_rope.dtype],
    )
    if bad >= 0:
        raise_slot_outside(int(slots[bad]), kv_pages)
    return True


def norm_rope_write(
    kv_pages: Tensor,
    slots: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    kv_format: KVFormat | None,
) -> bool:
    """See `pages.norm_rope_write`."""
    isa = isa_for(kv_a, norm_weight, cos, sin)
    if isa is None or kv_a.ndim != 2 or norm_weight.ndim != 1:
        return False
    tokens, width = kv_a.shape
    latent_dim = norm_weight.shape[0]
    rope_dim = width - latent_dim
    place = _place(kv_pages, slots, tokens, latent_dim, rope_dim, kv_format)
    angles = (tokens, rope_dim // 2)
    strides = kv_a.stride()
    if (
        place is None
        or rope_dim % 2
        or strides[1] != 1
        or cos.shape != angles
        or sin.shape != angles
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
        or not (cos.is_contiguous() and sin.is_contiguous() and norm_weight.is_contiguous())
    ):
        return False
    bad = extension.norm_rope_write(
        isa,
        *place,
        kv_a.data_ptr(),
        strides[0],
        DTYPE_CODES[kv_a.dtype],
        norm_weight.data_ptr(),
        DTYPE_CODES[norm_weight.dtype],
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
    )
    if bad >= 0:
        raise_slot_outside(int(slots[bad]), kv_pages)
    return True


def raise_slot_outside(slot: int, kv_pages: Tensor) -> None:
    """Say which slot the cache does not have."""
    raise OpError(f"slot {slot} is not one of the cache's {kv_pages.shape[0] * kv_pages.shape[1]} token slots")


def _place(
    kv_pages: Tensor, slots: Tensor, tokens: int, latent_dim: int, rope_dim: int, kv_format: KVFormat | None
) -> tuple[Any, ...] | None:
    """Addresses and sizes of the rows to write, or None where the kernels cannot write them."""
    if kv_pages.ndim != 3 or not kv_pages.is_contiguous() or not kv_pages.is_cpu:
        return None
    if slots.dtype is not torch.int64 or slots.shape != (tokens,) or not slots.is_contiguous() or not slots.is_cpu:
        return None
    pages, page_size, width = kv_pages.shape
    dtype = kv_pages.dtype
    code = _format_code(kv_format, dtype, latent_dim, rope_dim, width)
    if code is None:
        return None
    row_bytes = width * dtype.itemsize
    return kv_pages.data_ptr(), slots.data_ptr(), row_bytes, pages * page_size, code, tokens, latent_dim, rope_dim


@cache
def _format_code(
    kv_format: KVFormat | None, dtype: torch.dtype, latent_dim: int, rope_dim: int, width: int
) -> int | None:
    """A row's format as `csrc/cache_write.h` numbers it (the floats by their dtypes); None where it does not fit."""
    numbers = latent_dim + rope_dim
    if kv_format is None:
        return DTYPE_CODES.get(dtype) if rope_dim >= 0 and numbers <= min(width, MAX_ROW) else None
    if kv_format not in KV_FORMATS or dtype != storage_dtype(kv_format):
        return None
    if latent_dim < 1 or rope_dim < 0 or numbers > MAX_ROW:
        return None
    payload = latent_payload_bytes(kv_format, latent_dim, rope_dim)
    return KV_FORMATS.index(kv_format) if payload <= width * dtype.itemsize else None
