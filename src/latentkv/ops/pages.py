"""Reading and writing paged latents: where a token lies, and what its bytes mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_integers, require_shape
from latentkv.errors import OpError
from latentkv.ops.elementwise import apply_rope, rms_norm
from latentkv.ops.kv_formats import (
    FLOAT_DTYPES,
    KVFormat,
    decode_latents,
    encode_latents,
    latent_payload_bytes,
    storage_dtype,
)
from latentkv.ops.native import pages as native
from latentkv.ops.triton import calls as triton


def check_latent_pages(kv_pages: Tensor, latent_dim: int, rope_dim: int, kv_format: KVFormat | None) -> None:
    """Raise `OpError` unless pages [N, P, row] can hold rows of this shape and format."""
    if kv_pages.ndim != 3 or not kv_pages.is_contiguous():
        raise OpError(
            f"kv_pages must be a contiguous [N, P, row], not {list(kv_pages.shape)} with strides {kv_pages.stride()}"
        )
    dtype = kv_pages.dtype
    if kv_format is None:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise OpError(f"kv_pages of {dtype} need kv_format= to say what their bytes mean")
        payload = (latent_dim + rope_dim) * dtype.itemsize
    else:
        if dtype != storage_dtype(kv_format):
            raise OpError(f"{kv_format} pages are {storage_dtype(kv_format)}, but kv_pages are {dtype}")
        payload = latent_payload_bytes(kv_format, latent_dim, rope_dim)
    if kv_pages.shape[2] * dtype.itemsize < payload:
        raise OpError(
            f"a row of {latent_dim} latents and {rope_dim} rope dims takes {payload} bytes; kv_pages "
            f"{list(kv_pages.shape)} of {dtype} are too narrow"
        )


def write_latents(
    kv_pages: Tensor, slots: Tensor, latents: Tensor, k_rope: Tensor, *, kv_format: KVFormat | None = None
) -> None:
    """Store T tokens in the cache.

    Args:
        kv_pages: [N, P, row], changed in place.
        slots: [T] integers, page * P + offset of each token, all different.
        latents: [T, L] normed latents.
        k_rope: [T, R] rotated shared keys.
        kv_format: layout of uint8 pages; None = numbers of the pages' own dtype.

    Raises:
        OpError: shapes or dtypes do not fit, or a slot lies outside the cache (on a GPU it is left unwritten).
    """
    if native.write_latents(kv_pages, slots, latents, k_rope, kv_format):
        return
    require_shape("latents", latents, (None, None))
    require_floats(latents=latents, k_rope=k_rope)
    require_integers("slots", slots)
    tokens, latent_dim = latents.shape
    require_shape("slots", slots, (tokens,))
    require_shape("k_rope", k_rope, (tokens, None))
    check_latent_pages(kv_pages, latent_dim, k_rope.shape[1], kv_format)
    _require_slots_inside(kv_pages, slots)
    if triton.write_latents(kv_pages, slots, latents, k_rope, kv_format):
        return
    if kv_format is None or kv_format in FLOAT_DTYPES:
        rows = torch.cat([latents, k_rope], dim=1).to(kv_pages.dtype)
    else:
        rows = encode_latents(latents, k_rope, kv_format)[:, : kv_pages.shape[2]]
    kv_pages.view(-1, kv_pages.shape[2])[:, : rows.shape[1]].index_copy_(0, slots.to(torch.int64), rows)


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
    kv_format: KVFormat | None = None,
) -> None:
    """Norm T tokens' latents, rotate their shared keys and store both: what `kv_a_proj_with_mqa` is computed for.

    Equals `rms_norm` of the first L numbers, `apply_rope` of the others and `write_latents`, in one pass.

    Args:
        kv_pages: [N, P, row], changed in place.
        slots: [T] integers, page * P + offset of each token, all different.
        kv_a: [T, L + R] projected tokens; rows may be slices of wider ones.
        norm_weight: [L].
        eps: of the norm.
        cos: [T, R/2] float32.
        sin: like cos.
        interleaved: see `apply_rope`.
        kv_format: layout of uint8 pages; None = numbers of the pages' own dtype.

    Raises:
        OpError: shapes or dtypes do not fit, or a slot lies outside the cache (on a GPU it is left unwritten).
    """
    angles = cos, sin
    if native.norm_rope_write(
        kv_pages, slots, kv_a, norm_weight, eps, *angles, interleaved=interleaved, kv_format=kv_format
    ):
        return
    require_shape("kv_a", kv_a, (None, None))
    require_floats(kv_a=kv_a, norm_weight=norm_weight, cos=cos, sin=sin)
    require_integers("slots", slots)
    require_shape("norm_weight", norm_weight, (None,))
    tokens, width = kv_a.shape
    latent_dim = norm_weight.shape[0]
    rope_dim = width - latent_dim
    if rope_dim < 0 or rope_dim % 2:
        raise OpError(f"kv_a has {width} numbers a token; {latent_dim} latents leave {rope_dim}, not an even number")
    require_shape("slots", slots, (tokens,))
    require_shape("cos", cos, (tokens, rope_dim // 2))
    require_shape("sin", sin, (tokens, rope_dim // 2))
    check_latent_pages(kv_pages, latent_dim, rope_dim, kv_format)
    _require_slots_inside(kv_pages, slots)
    if triton.norm_rope_write(
        kv_pages, slots, kv_a, norm_weight, eps, *angles, interleaved=interleaved, kv_format=kv_format
    ):
        return
    latents, k_rope = kv_a.split([latent_dim, rope_dim], dim=1)
    latents, k_rope = rms_norm(latents, norm_weight, eps), apply_rope(k_rope, *angles, interleaved=interleaved)
    write_latents(kv_pages, slots, latents, k_rope, kv_format=kv_format)


def _require_slots_inside(kv_pages: Tensor, slots: Tensor) -> None:
    """The same refusal as the native kernels', on the CPU; a GPU's step does not wait to read its slots."""
    count = kv_pages.shape[0] * kv_pages.shape[1]
    if slots.is_cpu and slots.numel():
        outside = slots[(slots < 0) | (slots >= count)]
        if outside.numel():
            native.raise_slot_outside(int(outside[0]), kv_pages)


def read_latents(
    kv_pages: Tensor,
    pages: Tensor | Sequence[int],
    start: int,
    stop: int,
    *,
    latent_dim: int,
    rope_dim: int,
    kv_format: KVFormat | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Tokens start <= s < stop of one sequence.

    Args:
        kv_pages: [N, P, row].
        pages: [M] the sequence's page numbers, in order; those that the range does not touch may hold anything.
        start: first token.
        stop: one past the last token.
        latent_dim: L.
        rope_dim: R.
        kv_format: layout of uint8 pages; None = numbers of the pages' own dtype.
        dtype: of the result.

    Returns:
        [stop - start, L + R]; a view of the cache where neither copying nor converting is needed.

    Raises:
        OpError: the pages do not cover the range or lie outside the cache.
    """
    check_latent_pages(kv_pages, latent_dim, rope_dim, kv_format)
    rows = gather_tokens(kv_pages, pages, start, stop)
    return decode_rows(rows, latent_dim, rope_dim, kv_format, dtype)


def gather_tokens(kv_pages: Tensor, pages: Tensor | Sequence[int], start: int, stop: int) -> Tensor:
    """Rows [stop - start, ...] of tokens start <= s < stop; a view where the pages follow each other."""
    num_pages, page_size = kv_pages.shape[:2]
    flat = kv_pages.view(num_pages * page_size, *kv_pages.shape[2:])
    if stop <= start:
        return flat[:0]
    first, last = start // page_size, -(-stop // page_size)
    require(
        start >= 0 and last <= len(pages),
        f"tokens {start} to {stop} lie outside the {len(pages)} pages of {page_size} tokens that the sequence has",
    )
    used = pages[first:last]
    offset = start - first * page_size
    if isinstance(used, Tensor) and not used.is_cpu:  # not waited for, so not checked either
        return kv_pages.index_select(0, used).flatten(0, 1)[offset : offset + stop - start]
    ids: list[int] = used.tolist() if isinstance(used, Tensor) else list(used)
    if min(ids) < 0 or max(ids) >= num_pages:
        raise OpError(f"page {next(i for i in ids if not 0 <= i < num_pages)} is not one of the cache's {num_pages}")
    if ids == list(range(ids[0], ids[0] + len(ids))):
        begin = ids[0] * page_size + offset
        return flat[begin : begin + stop - start]
    index = torch.tensor(ids, device=kv_pages.device)
    return kv_pages.index_select(0, index).flatten(0, 1)[offset : offset + stop - start]


def decode_rows(rows: Tensor, latent_dim: int, rope_dim: int, kv_format: KVFormat | None, dtype: torch.dtype) -> Tensor:
    """[T, row] as stored -> [T, L + R] in `dtype`."""
    if kv_format is None:
        return rows[:, : latent_dim + rope_dim].to(dtype)
    return decode_latents(rows, kv_format, latent_dim, rope_dim, dtype)
