"""Writing tokens into pages: norm, rotation, quantisation and the scattered store, in one pass over each token.

The bytes are those of `kv_formats.encode_latents`. e4m3 is encoded by arithmetic, as only newer GPUs have the type.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.triton.elementwise_kernels import normed
from latentkv.ops.triton.latent_tile import FLOAT, INT8
from latentkv.ops.triton.numerics import rounded

NEAREST = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a float32 number below 2^22 and taken away again, it rounds to the nearest, even integer."""


@triton.jit(do_not_specialize=["num_slots"])
def write_kernel(
    pages,
    page_row,
    slots,
    num_slots,
    latents,
    latents_row,
    k_rope,
    k_rope_row,
    norm_weight,
    eps,
    cos,
    sin,
    FORMAT: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PAYLOAD: tl.constexpr,
    ROW: tl.constexpr,
    NORM_ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One program a token. A slot outside the cache is not written to."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    inside = tl.where((slot >= 0) & (slot < num_slots), 1, 0)
    own = pages + slot * page_row
    columns = tl.arange(0, BLOCK_L)
    known = columns < LATENT * inside
    x = tl.load(latents + token * latents_row + columns, mask=columns < LATENT, other=0.0)
    if NORM_ROPE:
        weight = tl.load(norm_weight + columns, mask=columns < LATENT, other=0.0)
        c = normed(x, weight, eps, LATENT)
    else:
        c = x.to(tl.float32)
    r = c
    rope_columns = columns
    rope_known = known
    if ROPE > 0:
        rope_columns = tl.arange(0, BLOCK_R)
        rope_known = rope_columns < ROPE * inside
        r = _rope(k_rope + token * k_rope_row, rope_columns, cos, sin, token, ROPE, NORM_ROPE, INTERLEAVED)
    if FORMAT == FLOAT:
        tl.store(own + columns, rounded(c, pages.dtype.element_ty), mask=known)
        if ROPE > 0:
            tl.store(own + LATENT + rope_columns, rounded(r, pages.dtype.element_ty), mask=rope_known)
    else:
        GROUP: tl.constexpr = BLOCK_L if BLOCK_L < 128 else 128
        GROUPS: tl.constexpr = (LATENT + 127) // 128
        groups = tl.arange(0, BLOCK_L // GROUP)
        scaled_groups = groups < GROUPS * inside
        values = tl.reshape(c, (BLOCK_L // GROUP, GROUP))
        if FORMAT == INT8:
            scales = _int8_scales(_largest(values, 1))
            tl.store(own + columns, tl.reshape(_int8_codes(values, scales[:, None]), (BLOCK_L,)), mask=known)
            at_scales = own + LATENT + ROPE
            _store_float16(at_scales, groups, scales, scaled_groups, (LATENT + ROPE) % 2 == 0)
            rope_scale = tl.zeros((1,), tl.float32)
            if ROPE > 0:
                rope_scale = _int8_scales(_largest(r[None, :], 1))
                codes = tl.reshape(_int8_codes(r[None, :], rope_scale[:, None]), (BLOCK_R,))
                tl.store(own + LATENT + rope_columns, codes, mask=rope_known)
            last = GROUPS + tl.arange(0, 1)
            _store_float16(at_scales, last, rope_scale, last < (GROUPS + 1) * inside, (LATENT + ROPE) % 2 == 0)
        else:
            scales = _fp8_scales(_largest(values, 1))
            codes = _e4m3_codes(tl.div_rn(values, tl.broadcast_to(scales[:, None], values.shape)))
            tl.store(own + columns, tl.reshape(codes, (BLOCK_L,)), mask=known)
            _store_float32(own + LATENT, groups, scales, scaled_groups, LATENT % 4 == 0)
            if ROPE > 0:
                _store_bfloat16(own + LATENT + 4 * GROUPS, rope_columns, r, rope_known, LATENT % 2 == 0)
        padding = PAYLOAD + tl.arange(0, 16)
        tl.store(own + padding, tl.zeros((16,), tl.uint8), mask=padding < ROW * inside)


@triton.jit
def _rope(own, columns, cos, sin, token, ROPE: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The token's shared key in float32; to ROTATE: turned and rounded to its own type."""
    x = tl.load(own + columns, mask=columns < ROPE, other=0.0)
    if ROTATE:
        HALF: tl.constexpr = ROPE // 2
        if INTERLEAVED:
            pair, second = columns // 2, columns % 2
            partner = columns + 1 - 2 * second
        else:
            second = columns // HALF
            pair = columns - HALF * second
            partner = columns + HALF - 2 * HALF * second
        known = columns < ROPE
        other = tl.load(own + partner, mask=known, other=0.0).to(tl.float32)
        c = tl.load(cos + token * HALF + pair, mask=known, other=0.0)
        s = tl.load(sin + token * HALF + pair, mask=known, other=0.0)
        values = rounded(x.to(tl.float32) * c + tl.where(second == 0, -other, other) * s, x.dtype)
    else:
        values = x.to(tl.float32)
    return values


@triton.jit
def _largest(values, axis: tl.constexpr):
    """The largest magnitude along `axis`, NaN if there is one."""
    magnitude = tl.max(tl.abs(values), axis)
    unknown = tl.max((values != values).to(tl.int32), axis)
    return tl.where(unknown > 0, float("nan"), magnitude)


@triton.jit
def _int8_scales(largest):
    """Largest / 127 in float16, one step larger where rounding down would clip by more than half a step; float32.

    Infinity where a number is not finite.
    """
    quotient = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    nearest = tl.where(quotient > 65504.0, 65504.0, quotient).to(tl.float16)
    larger = (nearest.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True).to(tl.float32)
    nearest = nearest.to(tl.float32)
    scales = tl.where((nearest * 127.5 < largest) & (larger <= 65504.0), larger, nearest)
    return tl.where(largest < float("inf"), scales, float("inf"))


@triton.jit
def _int8_codes(values, scales):
    scales = tl.broadcast_to(scales, values.shape)
    known = (scales > 0.0) & (scales < float("inf"))
    ratio = tl.where(known, tl.div_rn(values, tl.where(known, scales, 1.0)), 0.0)
    clipped = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    return ((clipped + NEAREST) - NEAREST).to(tl.int8).to(tl.uint8, bitcast=True)


@triton.jit
def _fp8_scales(largest):
    """The smallest power of two that brings each group within e4m3's range; infinity and NaN as they are."""
    bounded = tl.maximum(largest, 7.888609052210118e-31)  # 2^-100
    bits = tl.div_rn(bounded, tl.full(largest.shape, 448.0, tl.float32)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) == 0, 0, 1)
    scales = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), scales, largest)


@triton.jit
def _e4m3_codes(values):
    """float32 numbers as e4m3, rounded to the nearest and to even; beyond 448 they are clipped."""
    magnitude = tl.minimum(tl.abs(values), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the exponent's bias is 7, not 127
    subnormal = ((magnitude * 512.0 + NEAREST) - NEAREST).to(tl.int32)
    codes = tl.where(magnitude < 0.015625, subnormal, normal)
    codes = tl.where(values == values, codes, 0x7F)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (codes | sign).to(tl.uint8)


@triton.jit
def _store_float16(rows, index, values, known, ALIGNED: tl.constexpr):
    narrow = values.to(tl.float16)
    if ALIGNED:
        tl.store(rows.to(tl.pointer_type(tl.float16)) + index, narrow, mask=known)
    else:
        _store_16_bits(rows, index, narrow.to(tl.int16, bitcast=True).to(tl.int32), known)


@triton.jit
def _store_bfloat16(rows, index, values, known, ALIGNED: tl.constexpr):
    narrow = rounded(values, tl.bfloat16)
    if ALIGNED:
        tl.store(rows.to(tl.pointer_type(tl.bfloat16)) + index, narrow, mask=known)
    else:
        _store_16_bits(rows, index, narrow.to(tl.int32, bitcast=True) >> 16, known)


@triton.jit
def _store_float32(rows, index, values, known, ALIGNED: tl.constexpr):
    if ALIGNED:
        tl.store(rows.to(tl.pointer_type(tl.float32)) + index, values, mask=known)
    else:
        bits = values.to(tl.int32, bitcast=True)
        _store_16_bits(rows, 2 * index, bits, known)
        _store_16_bits(rows, 2 * index + 1, bits >> 16, known)


@triton.jit
def _store_16_bits(rows, index, bits, known):
    """The low 16 of `bits` as number `index` after the byte `rows`, which need not be aligned for them."""
    tl.store(rows + 2 * index, (bits & 0xFF).to(tl.uint8), mask=known)
    tl.store(rows + 2 * index + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask=known)
