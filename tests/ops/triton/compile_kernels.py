"""Compiles kernels for a GPU that is not here and prints what they need: a program, because Triton must not interpret.

usage: python compile_kernels.py TARGET all|some
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from latentkv.ops import KVFormat, latent_token_bytes, storage_dtype
from latentkv.ops.triton import attention, elementwise, moe, prefill, write
from latentkv.ops.triton.blocks import AMD, NVIDIA, AttendShape, SharedMemory, attend_blocks
from latentkv.ops.triton.launch import Launch
from latentkv.ops.triton.targets import compile_for

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# heads, L, R, dtype, format, what rows read
SOME_ATTENTION = [(16, 512, 64, BF16, "bf16", "range")]
MORE_ATTENTION = [
    (128, 512, 64, BF16, "bf16", "range"),
    (16, 512, 64, BF16, "fp8", "range"),
    (16, 512, 64, BF16, "bf16", "window"),
    (16, 512, 64, BF16, "int8", "slots"),
    (128, 512, 64, BF16, "fp8", "range"),
    (128, 512, 64, BF16, "int8", "range"),
    (16, 512, 64, FP32, "fp32", "range"),
    (20, 512, 64, FP16, "fp16", "range"),
    (40, 256, 32, BF16, "bf16", "range"),
    (5, 129, 7, BF16, "int8", "range"),
    (5, 129, 7, BF16, "fp8", "range"),
]


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def attention_launches(
    shared: SharedMemory, heads: int, latent: int, rope: int, dtype: torch.dtype, fmt: KVFormat, reads: str
) -> list[Launch]:
    store = storage_dtype(fmt)
    pages = torch.zeros(2, 64, latent_token_bytes(fmt, latent, rope) // store.itemsize, dtype=store)
    start = integers(2) if reads == "window" else None
    rows = attention.Rows(integers(2, 4), integers(3), start, integers(2), page_size=64)
    if reads == "slots":
        rows = attention.Rows.of_slots(integers(2, 4))
    return attention.attend_pages(
        torch.zeros(2, heads, latent + rope, dtype=dtype),
        pages,
        rows,
        torch.zeros(2, heads, latent, dtype=dtype),
        torch.zeros(2, heads),
        scale=0.1,
        kv_format=fmt,
        blocks=attend_blocks(AttendShape(heads, latent, rope, store, dtype), shared),
    )


def grouped_launches(shared: SharedMemory, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Launch]:
    rows = attention.Rows(integers(2, 4), integers(3), None, integers(2), page_size=64)
    q, pages = torch.zeros(2, heads, dim, dtype=dtype), torch.zeros(2, 64, 2, kv_heads, dim, dtype=dtype)
    blocks = attend_blocks(AttendShape(heads // kv_heads, dim, dim, dtype, dtype), shared)
    return attention.attend_pages(q, pages, rows, q, torch.zeros(2, heads), scale=0.1, blocks=blocks)


def other_launches(shared: SharedMemory, dtype: torch.dtype, formats: Sequence[KVFormat]) -> Iterator[Launch]:
    q, k, v = (torch.zeros(3, 4, width, dtype=dtype) for width in (192, 192, 128))
    out, lse, bounds = torch.zeros_like(v), torch.zeros(3, 4), (integers(2), integers(2))
    yield prefill.attend_new_tokens(q, k, v, *bounds, out, lse, scale=0.1, causal=True, shared=shared)
    x, weight, cos = torch.zeros(3, 576, dtype=dtype), torch.zeros(512, dtype=dtype), torch.zeros(3, 32)
    for fmt in formats:
        pages = torch.zeros(2, 64, latent_token_bytes(fmt, 512, 64), dtype=storage_dtype(fmt))
        slots, step = torch.zeros(3, dtype=torch.int64), write.NormRope(weight, 1e-6, cos, cos, interleaved=True)
        yield write.write_latents(pages, slots, x[:, :512], x[:, 512:], fmt, step)
    yield elementwise.rms_norm(x[:, :512], weight, 1e-6, torch.zeros(3, 512, dtype=dtype))
    yield elementwise.apply_rope(q[..., :64], cos, cos, q[..., :64], interleaved=False)
    states = torch.zeros(3, 4, 512), torch.zeros(3, 4)
    yield elementwise.merge_states(*states, *states, *states)
    ids, scales = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    experts = torch.zeros(4, 128, 64, dtype=dtype), torch.zeros(4, 64, 64, dtype=dtype)
    for zero_experts in (0, 2):
        out = torch.zeros(3, 64, dtype=dtype)
        yield from moe.moe_experts(x[:, :64], ids, scales, *experts, None, out, num_zero_experts=zero_experts)


def main(target: str, extent: str) -> None:
    shared = NVIDIA[int(target.removeprefix("sm_"))] if target.startswith("sm_") else AMD
    launches = [launch for case in SOME_ATTENTION for launch in attention_launches(shared, *case)]
    formats: list[KVFormat] = ["fp8"] if extent == "some" else ["bf16", "fp8", "int8"]
    launches += other_launches(shared, BF16, formats)
    if extent == "all":
        launches += [launch for case in MORE_ATTENTION for launch in attention_launches(shared, *case)]
        launches += grouped_launches(shared, 32, 8, 128, BF16) + grouped_launches(shared, 4, 4, 64, FP32)
        launches += other_launches(shared, FP32, formats)
    compiled = [asdict(compile_for(launch, target)) | {"limit": shared.size} for launch in launches]
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
