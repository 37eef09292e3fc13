"""How a cached token is laid out in bytes: `[c ; k_rope]` of L + R numbers in one of five formats.

| format           | one token                                                              | bytes at 512 + 64   |
|------------------|------------------------------------------------------------------------|---------------------|
| fp32, bf16, fp16 | L + R numbers                                                          | 2304, 1152, 1152    |
| fp8 (FlashMLA's) | L e4m3, one float32 power-of-two scale per 128 latents, R bf16         | 656                 |
| int8             | L int8, R int8, float16 scales: one per 128 latents and one for k_rope | 586 in a row of 592 |

A token's *payload* is what the table counts; its *row* is the payload padded to a multiple of 16 bytes, so that every
row starts aligned. The padding is really allocated, so it is counted: `latent_token_bytes` is the size of a row.

A group of 128 latents (and int8's rotated key) in which a number is NaN or infinite gets a scale that is not finite;
int8's is infinity, with codes of 0, so that all of the group reads as NaN. int8 clips finite numbers beyond
127 * 65504 (8.3e6); fp16 and bf16 round what is beyond their largest number to infinity.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_shape
from latentkv.errors import OpError

KVFormat = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
FLOAT_DTYPES: dict[KVFormat, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ROW_ALIGNMENT = 16
SCALE_GROUP = 128
E4M3_MAX = 448.0
E4M3_PER_FLOAT16 = 256.0
INT8_MAX = 127.0


def storage_dtype(fmt: KVFormat) -> torch.dtype:
    """The element type of pages in this format: the float itself, or uint8 for a quantised row."""
    _require_format(fmt)
    return FLOAT_DTYPES.get(fmt, torch.uint8)


def latent_payload_bytes(fmt: KVFormat, latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token and layer that carry data."""
    _require_format(fmt)
    require(
        latent_dim >= 1 and rope_dim >= 0,
        f"a latent row needs latent_dim >= 1 and rope_dim >= 0, not {latent_dim} and {rope_dim}",
    )
    groups = -(-latent_dim // SCALE_GROUP)
    if fmt == "int8":
        return latent_dim + rope_dim + 2 * (groups + 1)
    if fmt == "fp8":
        return latent_dim + 4 * groups + 2 * rope_dim
    return (latent_dim + rope_dim) * FLOAT_DTYPES[fmt].itemsize


def latent_token_bytes(fmt: KVFormat, latent_dim: int, rope_dim: int) -> int:
    """Bytes of one token and layer as allocated: the payload padded to a multiple of 16."""
    return padded(latent_payload_bytes(fmt, latent_dim, rope_dim))


def padded(size: int) -> int:
    """`size` bytes rounded up to the alignment of a row."""
    return -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def encode_latents(latents: Tensor, k_rope: Tensor, fmt: KVFormat) -> Tensor:
    """Rows to store for T tokens.

    Args:
        latents: [T, L] normed latents c, any float dtype.
        k_rope: [T, R] rotated shared keys.
        fmt: layout of a row.

    Returns:
        [T, row] in `storage_dtype(fmt)`; a row is `latent_token_bytes` long, its padding zero.

    Raises:
        OpError: the shapes do not fit together or the format is unknown.
    """
    dtype = storage_dtype(fmt)
    require_floats(latents=latents, k_rope=k_rope)
    require_shape("latents", latents, (None, None))
    require_shape("k_rope", k_rope, (latents.shape[0], None))
    row_bytes = latent_token_bytes(fmt, latents.shape[1], k_rope.shape[1])
    if fmt == "int8":
        payload = _encode_int8(latents.float(), k_rope.float())
    elif fmt == "fp8":
        payload = _encode_fp8(latents.float(), k_rope)
    else:
        payload = torch.cat([latents.to(dtype), k_rope.to(dtype)], dim=1)
    return torch.nn.functional.pad(payload, (0, row_bytes // dtype.itemsize - payload.shape[1]))


def decode_latents(
    rows: Tensor, fmt: KVFormat, latent_dim: int, rope_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers that stored rows stand for.

    Args:
        rows: [T, row] in `storage_dtype(fmt)`, at least the payload long.
        fmt: layout of a row.
        latent_dim: L.
        rope_dim: R.
        dtype: of the result.

    Returns:
        [T, L + R]; a view of `rows` where nothing has to be converted.

    Raises:
        OpError: the rows are of another type or too short for this format.
    """
    payload = latent_payload_bytes(fmt, latent_dim, rope_dim)
    require(
        rows.ndim == 2 and rows.dtype == storage_dtype(fmt) and rows.shape[1] * rows.dtype.itemsize >= payload,
        f"{fmt} rows of {latent_dim} latents and {rope_dim} rope dims need {payload} bytes of {storage_dtype(fmt)} "
        f"each; these are {list(rows.shape)} of {rows.dtype}",
    )
    if fmt == "int8":
        return _decode_int8(rows, latent_dim, rope_dim, dtype)
    if fmt == "fp8":
        return _decode_fp8(rows, latent_dim, rope_dim, dtype)
    return rows[:, : latent_dim + rope_dim].to(dtype)


def _require_format(fmt: str) -> None:
    if fmt not in KV_FORMATS:
        raise OpError(f"unknown cache format {fmt!r}; choose one of {', '.join(KV_FORMATS)}")


def _latent_groups(latent_dim: int) -> list[slice]:
    """The runs of latents that share a scale; the last may be short."""
    return [slice(i, min(i + SCALE_GROUP, latent_dim)) for i in range(0, latent_dim, SCALE_GROUP)]


def _int8_groups(latent_dim: int, rope_dim: int) -> list[slice]:
    return [*_latent_groups(latent_dim), slice(latent_dim, latent_dim + rope_dim)]


def _group_absmax(values: Tensor, groups: list[slice]) -> Tensor:
    """[T, groups] largest magnitude of each group (0 for an empty one)."""
    zero = values.new_zeros(values.shape[0], 1)
    return torch.stack([torch.cat([values[:, g].abs(), zero], dim=1).amax(dim=1) for g in groups], dim=1)


def _encode_int8(latents: Tensor, k_rope: Tensor) -> Tensor:
    values = torch.cat([latents, k_rope], dim=1)
    groups = _int8_groups(latents.shape[1], k_rope.shape[1])
    scales = _int8_scales(_group_absmax(values, groups))
    codes = torch.empty_like(values, dtype=torch.int8)
    for i, group in enumerate(groups):
        # Divide by the scale as stored, so that decoding undoes exactly this division; a zero scale has zero codes.
        scale = scales[:, i : i + 1].float()
        ratio = torch.where((scale > 0) & (scale < torch.inf), values[:, group] / scale, 0.0)
        codes[:, group] = ratio.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1)


def _int8_scales(absmax: Tensor) -> Tensor:
    """The scales absmax / 127 in float16, one step larger where rounding down would clip by more than half a step.

    At most the largest float16 for numbers that are finite, and infinity for a group where one is not.
    """
    nearest = (absmax / INT8_MAX).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    larger = (nearest.view(torch.int16) + 1).view(torch.float16)
    clips = (nearest.float() * (INT8_MAX + 0.5) < absmax) & torch.isfinite(larger)
    return torch.where(torch.isfinite(absmax), torch.where(clips, larger, nearest), torch.inf)


def _decode_int8(rows: Tensor, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    width = latent_dim + rope_dim
    groups = _int8_groups(latent_dim, rope_dim)
    values = rows[:, :width].view(torch.int8).to(dtype)
    # Not cast to `dtype`: a scale rounded to bf16 would shift its whole group.
    scales = _reinterpret(rows[:, width : width + 2 * len(groups)], torch.float16).float()
    for i, group in enumerate(groups):
        values[:, group] *= scales[:, i : i + 1]
    return values


def _encode_fp8(latents: Tensor, k_rope: Tensor) -> Tensor:
    groups = _latent_groups(latents.shape[1])
    scales = _fp8_scales(_group_absmax(latents, groups))
    codes = torch.empty_like(latents, dtype=torch.float8_e4m3fn)
    for i, group in enumerate(groups):
        scaled = latents[:, group] / scales[:, i : i + 1]
        codes[:, group] = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    rope = k_rope.to(torch.bfloat16).contiguous()
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)], dim=1)


def _fp8_scales(absmax: Tensor) -> Tensor:
    """The smallest power of two that brings each group within e4m3's range: 2^ceil(log2(absmax / 448)), exactly."""
    mantissa, exponent = torch.frexp(absmax.clamp(min=2.0**-100) / E4M3_MAX)
    scales = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return torch.where(torch.isfinite(absmax), scales, absmax)


def _decode_fp8(rows: Tensor, latent_dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    groups = _latent_groups(latent_dim)
    rope_at = latent_dim + 4 * len(groups)
    values = torch.empty(rows.shape[0], latent_dim + rope_dim, dtype=dtype, device=rows.device)
    values[:, :latent_dim] = _e4m3_as_float16(rows[:, :latent_dim])
    values[:, latent_dim:] = _reinterpret(rows[:, rope_at : rope_at + 2 * rope_dim], torch.bfloat16).to(dtype)
    scales = _reinterpret(rows[:, latent_dim:rope_at], torch.float32) * E4M3_PER_FLOAT16
    if dtype != torch.float16:  # which has no room for large and small scales; in bf16 they are exact
        scales = scales.to(dtype)
    for i, group in enumerate(groups):
        values[:, group] *= scales[:, i : i + 1]
    return values


def _e4m3_as_float16(codes: Tensor) -> Tensor:
    """The value / 256 of e4m3 bytes, exactly and ten times faster than torch's cast on a CPU.

    float16 has the same sign-exponent-mantissa order with an exponent bias larger by 8, so shifting the bits is enough,
    subnormals included. e4m3's NaN becomes a number: a NaN latent is carried by its group's scale instead.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is extended into bit 15
    return ((bits << 7) & ~0x4000 & ~0x007F).view(torch.float16)


def _reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes seen as another type; copied first, because inside a row they need not be aligned for it."""
    flat = rows.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(dtype).view(rows.shape[0], rows.shape[1] // dtype.itemsize)
