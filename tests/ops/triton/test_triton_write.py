"""Writing latents on Triton's kernels: the bytes are those of `encode_latents`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentkv.errors import OpError
from latentkv.ops import (
    KVFormat,
    apply_rope,
    decode_latents,
    encode_latents,
    latent_token_bytes,
    norm_rope_write,
    rms_norm,
    storage_dtype,
    write_latents,
)
from latentkv.ops.kv_formats import FLOAT_DTYPES, KV_FORMATS

Run = Callable[..., Any]


def row_bytes(pages: torch.Tensor) -> torch.Tensor:
    return pages.flatten(0, 1).view(torch.uint8)


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize(
    ("dtype", "latent_dim", "rope_dim"),
    [
        (torch.bfloat16, 512, 64),
        (torch.float32, 20, 6),
        (torch.float16, 200, 0),
        (torch.float32, 129, 7),
    ],
)
def test_the_bytes_written_are_those_of_encode_latents(
    run: Run, fmt: KVFormat, dtype: torch.dtype, latent_dim: int, rope_dim: int
) -> None:
    tokens, gen = 40, torch.Generator().manual_seed(0)
    values = torch.randn(tokens, 3 + latent_dim + rope_dim, generator=gen)
    values = (values * 10 ** torch.linspace(-7, 5, tokens)[:, None]).to(dtype)
    values[3] = 0
    values[4] *= 1e6
    c, k_rope = values[:, 3:].split([latent_dim, rope_dim], dim=1)
    expected = encode_latents(c, k_rope, fmt)
    pages = torch.full((6, 8, expected.shape[1]), 77).to(storage_dtype(fmt))
    slots = torch.randperm(48, generator=gen)[:tokens]
    run(write_latents, pages, slots, c, k_rope, kv_format=fmt)
    untouched = torch.ones(48, dtype=torch.bool).index_fill_(0, slots, False)
    assert (pages.flatten(0, 1)[untouched] == 77).all()
    if fmt in FLOAT_DTYPES:
        width = latent_dim + rope_dim
        assert (pages.flatten(0, 1)[:, width:] == 77).all()
        pages, expected = pages[..., :width].contiguous(), expected[:, :width].contiguous()
    assert torch.equal(row_bytes(pages)[slots], expected.view(torch.uint8))


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_no_number_stays_in_its_group(run: Run, fmt: KVFormat, bad: float) -> None:
    pages = torch.zeros(1, 2, latent_token_bytes(fmt, 256, 16), dtype=torch.uint8)
    c = torch.randn(2, 256)
    c[0, 130] = bad
    run(write_latents, pages, torch.tensor([0, 1]), c, torch.randn(2, 16), kv_format=fmt)
    read = decode_latents(pages[0], fmt, 256, 16)
    assert read[1].isfinite().all()
    assert read[0, :128].isfinite().all()
    assert read[0, 256:].isfinite().all()
    assert not read[0, 130].isfinite()
    if fmt == "int8":
        assert read[0, 128:256].isnan().all()


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("fmt", [None, *KV_FORMATS])
@pytest.mark.parametrize("interleaved", [True, False])
def test_norm_rope_write_equals_its_three_steps(run: Run, fmt: KVFormat | None, interleaved: bool) -> None:
    gen, tokens = torch.Generator().manual_seed(0), 9
    kv_a = torch.randn(tokens, 10 + 136 + 16, generator=gen).bfloat16()[:, 10:]
    weight, phase = torch.randn(136, generator=gen).bfloat16(), torch.randn(tokens, 8, generator=gen)
    cos, sin = phase.cos(), phase.sin()
    dtype = torch.bfloat16 if fmt is None else storage_dtype(fmt)
    fused = torch.zeros(12, 4, latent_token_bytes(fmt or "bf16", 136, 16) // dtype.itemsize, dtype=dtype)
    stepwise, slots = fused.clone(), torch.arange(tokens).flip(0)
    run(norm_rope_write, fused, slots, kv_a, weight, 1e-6, cos, sin, interleaved=interleaved, kv_format=fmt)
    k_rope = apply_rope(kv_a[:, 136:], cos, sin, interleaved=interleaved)
    write_latents(stepwise, slots, rms_norm(kv_a[:, :136], weight, 1e-6), k_rope, kv_format=fmt)
    numbers = [
        decode_latents(pages.flatten(0, 1)[slots], fmt or "bf16", 136, 16).double() for pages in (fused, stepwise)
    ]
    # The norms may fall to either side of a rounding to bf16, and to a code of the format.
    torch.testing.assert_close(numbers[0], numbers[1], atol=0.02, rtol=0.07 if fmt == "fp8" else 2**-7)
    assert (numbers[0] != numbers[1]).float().mean() < 0.01


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("slot", [-1, 20])
def test_slots_outside_a_cache_on_the_cpu_are_refused_before_anything_is_written(run: Run, slot: int) -> None:
    pages = torch.zeros(5, 4, 32)
    with pytest.raises(OpError, match=f"slot {slot} is not one of the cache's 20"):
        run(write_latents, pages, torch.tensor([3, slot]), torch.ones(2, 20), torch.ones(2, 6))
    assert not pages.any()


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
def test_the_kernel_leaves_slots_outside_the_cache_unwritten(device: torch.device, fmt: KVFormat) -> None:
    from latentkv.ops.triton import write

    width = latent_token_bytes(fmt, 20, 6) // storage_dtype(fmt).itemsize
    memory = torch.zeros(9, 4, width, dtype=storage_dtype(fmt), device=device)
    pages = memory[2:7]  # what lies before and after is not the cache's
    slots = torch.tensor([3, -1, 20], device=device)
    write.write_latents(pages, slots, torch.ones(3, 20, device=device), torch.ones(3, 6, device=device), fmt).run()
    assert memory.flatten(0, 1).any(dim=1).nonzero().flatten().tolist() == [11]
