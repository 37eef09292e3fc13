"""Writing the latent cache on the C++ kernels. Each returns whether it wrote: where not, torch is to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops.native.core import DTYPE_CODES, extension
from latentkv.ops.native.elementwise import MAX_ROW
from latentkv.ops.native.eligible import isa_for

_FORMAT_CODES = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "fp8": 4}
"""Row formats as `csrc/cache_write.h` numbers them; the floats have their dtypes' numbers."""


def write_latents(kv_pages: Tensor, slots: Tensor, latents: Tensor, k_rope: Tensor, kv_format: str | None) -> bool:
    """See `pages.write_latents`."""
    isa = isa_for(latents, k_rope)
    place = None if isa is None else _place(kv_pages, slots, kv_format)
    if place is None or latents.stride(1) != 1 or k_rope.stride(1) != 1:
        return False
    latent_dim, rope_dim = latents.shape[1], k_rope.shape[1]
    if latent_dim + rope_dim > MAX_ROW:
        return False
    bad = extension.write_latents(
        isa,
        *place,
        latents.shape[0],
        latent_dim,
        rope_dim,
        latents.data_ptr(),
        latents.stride(0),
        DTYPE_CODES[latents.dtype],
        k_rope.data_ptr(),
        k_rope.stride(0),
        DTYPE_CODES[k_rope.dtype],
    )
    _require_slots(bad, slots, kv_pages)
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
    kv_format: str | None,
) -> bool:
    """See `pages.norm_rope_write`."""
    isa = isa_for(kv_a, norm_weight, cos, sin)
    place = None if isa is None else _place(kv_pages, slots, kv_format)
    if place is None or cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return False
    row_stride, number_stride = kv_a.stride()
    if number_stride != 1 or kv_a.shape[1] > MAX_ROW:
        return False
    if not (norm_weight.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        return False
    tokens, width = kv_a.shape
    latent_dim = norm_weight.shape[0]
    bad = extension.norm_rope_write(
        isa,
        *place,
        tokens,
        latent_dim,
        width - latent_dim,
        kv_a.data_ptr(),
        row_stride,
        DTYPE_CODES[kv_a.dtype],
        norm_weight.data_ptr(),
        DTYPE_CODES[norm_weight.dtype],
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
    )
    _require_slots(bad, slots, kv_pages)
    return True


def _place(kv_pages: Tensor, slots: Tensor, kv_format: str | None) -> tuple[Any, ...] | None:
    """Addresses and sizes of the cache's rows, or None where the kernels cannot write them."""
    format_code = DTYPE_CODES.get(kv_pages.dtype) if kv_format is None else _FORMAT_CODES[kv_format]
    if format_code is None or not kv_pages.is_cpu:
        return None
    if slots.dtype is not torch.int64 or not slots.is_contiguous() or not slots.is_cpu:
        return None
    pages, page_size, width = kv_pages.shape
    return kv_pages.data_ptr(), slots.data_ptr(), width * kv_pages.itemsize, pages * page_size, format_code


def _require_slots(bad: int, slots: Tensor, kv_pages: Tensor) -> None:
    if bad >= 0:
        raise OpError(
            f"slot {int(slots[bad])} is not one of the cache's {kv_pages.shape[0] * kv_pages.shape[1]} token slots"
        )
