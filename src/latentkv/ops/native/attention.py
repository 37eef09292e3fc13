"""The native attention kernels: tensors to addresses. The public ops have checked shapes; lengths are checked below."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentkv.checks import as_int32
from latentkv.errors import OpError
from latentkv.kernels import DTYPE_CODES, extension
from latentkv.ops.kv_formats import KV_FORMATS, KVFormat, latent_payload_bytes
from latentkv.ops.native import eligible


def isa_for(q: Tensor, pages: Tensor, *others: Tensor) -> Any | None:
    """The instruction set that computes attention of these tensors; None where torch has to."""
    tensors = q, *others
    for t in (pages, *tensors):
        if t.stride(-1) != 1:
            return None
    if pages.dtype is torch.uint8 and pages.is_cpu:
        return eligible.isa_for(*tensors)
    return eligible.isa_for(pages, *tensors)


def attend_pages(
    isa: Any,
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    start: Tensor | None,
    stop: Tensor,
    slots: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    kv_heads: int,
    head_numbers: int,
    value_offset: int,
    scale: float,
    kv_format: KVFormat | None = None,
    longer_ranges: bool = False,
    int8_products: bool = False,
) -> bool:
    """Fill out [T, H, Dv] and lse [T, H]; False: a page number, slot or length is beyond int32, and torch has to.

    A token's row in kv_pages [N, P, ...] holds the key of key/value head g from number g * head_numbers on, and its
    value value_offset numbers later (0: the value begins the key). Quantised rows (kv_format) are latents: one head,
    whose value begins its key.

    Raises:
        OpError: q_start does not fit, or the pages or slots do not cover what is read.
    """
    rows, heads, width = q.shape
    q_row, q_head, _ = q.stride()
    out_row, out_head, _ = out.stride()
    value_width, size = out.shape[2], kv_pages.element_size()
    if kv_pages.dtype is torch.uint8 and kv_format is not None:
        format_code = KV_FORMATS.index(kv_format)
        key_bytes = value_bytes = latent_payload_bytes(kv_format, value_width, width - value_width)
    else:
        format_code, key_bytes, value_bytes = DTYPE_CODES[kv_pages.dtype], width * size, value_width * size
    table, bounds, ends = _int32(block_table), _int32(q_start), _int32(stop)
    begins = None if start is None else _int32(start)
    places = None if slots is None else _int32(slots)
    if table is None or bounds is None or ends is None:
        return False
    if (start is not None and begins is None) or (slots is not None and places is None):
        return False
    try:
        extension.attend_pages(
            isa,
            q.data_ptr(),
            DTYPE_CODES[q.dtype],
            q_row,
            q_head,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out_row,
            out_head,
            lse.data_ptr(),
            rows,
            heads,
            kv_heads,
            kv_pages.data_ptr(),
            format_code,
            kv_pages.stride(1) * size,
            head_numbers * size,
            value_offset * size,
            width,
            key_bytes,
            value_width,
            value_bytes,
            kv_pages.shape[0],
            kv_pages.shape[1],
            table.data_ptr(),
            table.stride(0),
            table.shape[1],
            table.shape[0],
            bounds.data_ptr(),
            0 if begins is None else begins.data_ptr(),
            ends.data_ptr(),
            0 if places is None else places.data_ptr(),
            0 if places is None else places.shape[1],
            longer_ranges,
            scale,
            int8_products,
        )
    except ValueError as error:
        raise OpError(str(error)) from None
    return True


def attend_new_tokens(
    isa: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
) -> None:
    """Fill out [T, H, Dv] and lse [T, H] from q [T, H, Dq], k [S, H, Dq] and v [S, H, Dv], any strides.

    q_start and kv_start are checked, and so within int32.
    """
    size = k.element_size()
    q_start, kv_start = (t.to(torch.int32).contiguous() for t in (q_start, kv_start))
    extension.attend_new_tokens(
        isa,
        q.data_ptr(),
        DTYPE_CODES[q.dtype],
        q.stride(0),
        q.stride(1),
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        out.stride(0),
        out.stride(1),
        lse.data_ptr(),
        q.shape[0],
        q.shape[1],
        k.data_ptr(),
        v.data_ptr(),
        DTYPE_CODES[k.dtype],
        k.stride(0) * size,
        k.stride(1) * size,
        v.stride(0) * size,
        v.stride(1) * size,
        q.shape[2],
        v.shape[2],
        q_start.shape[0] - 1,
        q_start.data_ptr(),
        kv_start.data_ptr(),
        causal,
        scale,
    )


def _int32(numbers: Tensor) -> Tensor | None:
    return as_int32(numbers) if numbers.is_cpu else None
