"""Writing tokens into pages on Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentkv.ops.kv_formats import FLOAT_DTYPES, KVFormat, latent_payload_bytes, latent_token_bytes
from latentkv.ops.triton import write_kernels as kernels
from latentkv.ops.triton.blocks import block_size
from latentkv.ops.triton.elementwise import warps_for
from latentkv.ops.triton.latent_tile import format_code
from latentkv.ops.triton.launch import Launch


@dataclass(frozen=True)
class NormRope:
    """What is done to a token before it is stored, see `pages.norm_rope_write`."""

    weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    interleaved: bool


def write_latents(
    kv_pages: Tensor,
    slots: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    kv_format: KVFormat | None,
    norm_rope: NormRope | None = None,
) -> Launch:
    """What stores latents [T, L] and k_rope [T, R], rows at any distance; shapes are checked. See `pages`."""
    tokens, latent_dim = latents.shape
    rope_dim = k_rope.shape[1]
    quantised = None if kv_format in FLOAT_DTYPES else kv_format
    payload = row = 0
    if quantised is not None:
        payload = latent_payload_bytes(quantised, latent_dim, rope_dim)
        row = min(latent_token_bytes(quantised, latent_dim, rope_dim), kv_pages.shape[2])
    unused = NormRope(latents, 0.0, latents, latents, interleaved=False)
    step = norm_rope or unused
    return Launch(
        kernels.write_kernel,
        (tokens,),
        (
            *(kv_pages, kv_pages.stride(1), slots, kv_pages.shape[0] * kv_pages.shape[1]),
            *(latents, latents.stride(0), k_rope, k_rope.stride(0)),
            *(step.weight, step.eps, step.cos, step.sin),
        ),
        {
            "FORMAT": format_code(quantised),
            "LATENT": latent_dim,
            "ROPE": rope_dim,
            "BLOCK_L": block_size(latent_dim),
            "BLOCK_R": block_size(rope_dim),
            "PAYLOAD": payload,
            "ROW": row,
            "NORM_ROPE": norm_rope is not None,
            "INTERLEAVED": step.interleaved,
        },
        num_warps=warps_for(block_size(latent_dim)),
    )
