"""Reading a block of cached tokens on a GPU: `kv_formats` says what the bytes mean.

Bytes of e4m3 are decoded by arithmetic: only GPUs of capability 8.9 and later have the type.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from latentkv.ops.kv_formats import KVFormat
from latentkv.ops.triton.numerics import operand

FLOAT, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def format_code(quantised: KVFormat | None) -> int:
    """A row's format as the kernels number it; None: numbers of the pages' own dtype."""
    return {None: FLOAT, "int8": INT8, "fp8": FP8}[quantised].value


@triton.jit
def load_latents(
    rows,
    read,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Latents [BLOCK_N, BLOCK_L] in `dtype` of the tokens whose rows start at `rows` [BLOCK_N]; 0 where not `read`."""
    columns = tl.arange(0, BLOCK_L)
    values = _load(rows[:, None] + columns[None, :], columns[None, :], LATENT, BLOCK_L, read, MASKED)
    if FORMAT != FLOAT:
        GROUP: tl.constexpr = BLOCK_L if BLOCK_L < 128 else 128
        GROUPS: tl.constexpr = (LATENT + 127) // 128
        groups = tl.arange(0, BLOCK_L // GROUP)
        known = (groups < GROUPS)[None, :] & read[:, None]
        if FORMAT == INT8:
            values = values.to(tl.int8, bitcast=True).to(tl.float32)
            scales = _load_float16(rows[:, None] + LATENT + ROPE, groups[None, :], known, (LATENT + ROPE) % 2 == 0)
        else:
            values = _e4m3(values)
            scales = _load_float32(rows[:, None] + LATENT, groups[None, :], known, LATENT % 4 == 0)
        values = tl.reshape(values, (rows.shape[0], BLOCK_L // GROUP, GROUP)) * scales[:, :, None]
        values = tl.reshape(values, (rows.shape[0], BLOCK_L))
    return operand(values, dtype)


@triton.jit
def load_rope(
    rows,
    read,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Shared keys [BLOCK_N, BLOCK_R] in `dtype`, as `load_latents`."""
    columns = tl.arange(0, BLOCK_R)
    GROUPS: tl.constexpr = (LATENT + 127) // 128
    if FORMAT == FP8:
        first = rows[:, None] + LATENT + 4 * GROUPS
        known = (columns < ROPE)[None, :] & read[:, None]
        if LATENT % 2 == 0:
            values = tl.load(first.to(tl.pointer_type(tl.bfloat16)) + columns[None, :], mask=known, other=0.0)
        else:
            values = _load_16_bits(first, columns[None, :], known).to(tl.bfloat16, bitcast=True)
    else:
        values = _load(rows[:, None] + LATENT + columns[None, :], columns[None, :], ROPE, BLOCK_R, read, MASKED)
        if FORMAT == INT8:
            scale = _load_float16(rows + LATENT + ROPE, GROUPS, read, (LATENT + ROPE) % 2 == 0)
            values = values.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
    return operand(values, dtype)


@triton.jit
def _load(pointers, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, read, MASKED: tl.constexpr):
    """Without a mask where none is needed: such loads are copied in the background."""
    if MASKED:
        values = tl.load(pointers, mask=read[:, None] & (columns < WIDTH), other=0)
    elif WIDTH < BLOCK:
        values = tl.load(pointers, mask=columns < WIDTH, other=0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _e4m3(codes):
    """The value / 256 of e4m3 bytes: float16 has the same order of bits, and an exponent bias larger by 8.

    The scales are multiplied by 256 instead. A NaN code becomes a number: a NaN latent is carried by its group's scale.
    """
    wide = codes.to(tl.int8, bitcast=True).to(tl.int16)  # the sign is extended into bit 15
    return ((wide << 7) & -0x4080).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_float32(rows, index, known, ALIGNED: tl.constexpr):
    """The float32 number `index` after the byte `rows`, times 256 for `_e4m3`."""
    if ALIGNED:
        numbers = tl.load(rows.to(tl.pointer_type(tl.float32)) + index, mask=known, other=0.0)
    else:
        low = _load_16_bits(rows, 2 * index, known).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = _load_16_bits(rows, 2 * index + 1, known).to(tl.uint16, bitcast=True).to(tl.uint32)
        numbers = (low | (high << 16)).to(tl.float32, bitcast=True)
    return numbers * 256.0


@triton.jit
def _load_float16(rows, index, known, ALIGNED: tl.constexpr):
    if ALIGNED:
        numbers = tl.load(rows.to(tl.pointer_type(tl.float16)) + index, mask=known, other=0.0)
    else:
        numbers = _load_16_bits(rows, index, known).to(tl.float16, bitcast=True)
    return numbers.to(tl.float32)


@triton.jit
def _load_16_bits(rows, index, known):
    """The 16 bits `index` after the byte `rows`, which need not be aligned for them."""
    low = tl.load(rows + 2 * index, mask=known, other=0).to(tl.uint16)
    high = tl.load(rows + 2 * index + 1, mask=known, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.int16, bitcast=True)
