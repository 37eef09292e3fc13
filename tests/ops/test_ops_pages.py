"""Writing latents to pages and reading a sequence back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops_cases import UNUSED_PAGE, token_slots

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops import (
    KVFormat,
    apply_rope,
    decode_latents,
    encode_latents,
    latent_token_bytes,
    norm_rope_write,
    read_latents,
    rms_norm,
    write_latents,
)
from latentkv.ops.kv_formats import FLOAT_DTYPES, KV_FORMATS, storage_dtype


@pytest.fixture(params=kernels.available_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


def empty_pages(fmt: KVFormat, num_pages: int = 5, page_size: int = 4) -> torch.Tensor:
    dtype = storage_dtype(fmt)
    return torch.zeros(num_pages, page_size, latent_token_bytes(fmt, 20, 6) // dtype.itemsize, dtype=dtype)


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("table", [[3, 0, 4], [1, 2, 3]])
def test_what_is_written_is_read_back_from_scattered_and_consecutive_pages(fmt: KVFormat, table: list[int]) -> None:
    pages = empty_pages(fmt)
    c, k_rope = torch.randn(11, 20), torch.randn(11, 6)
    own = torch.tensor([[*table, UNUSED_PAGE]])
    write_latents(pages, token_slots(own, 0, 11, 4), c, k_rope, kv_format=fmt)
    kept = decode_latents(encode_latents(c, k_rope, fmt), fmt, 20, 6)
    for start, stop in [(0, 11), (3, 5), (5, 8), (10, 11), (4, 4)]:
        for names in (own[0], table):
            read = read_latents(pages, names, start, stop, latent_dim=20, rope_dim=6, kv_format=fmt)
            assert torch.equal(read, kept[start:stop])


def test_only_the_named_slots_change() -> None:
    pages = empty_pages("bf16")
    write_latents(pages, torch.tensor([7, 2]), torch.ones(2, 20), torch.ones(2, 6), kv_format="bf16")
    assert pages.flatten(0, 1).abs().sum(dim=1).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize(("pages", "stop"), [([0, 9], 8), ([0, -1], 8), ([0, 1], 9)])
def test_pages_that_do_not_exist_or_do_not_reach_are_refused(pages: list[int], stop: int) -> None:
    with pytest.raises(OpError):
        read_latents(empty_pages("bf16"), pages, 0, stop, latent_dim=20, rope_dim=6)


def test_rows_that_do_not_fit_the_pages_are_refused() -> None:
    with pytest.raises(OpError, match="too narrow"):
        write_latents(empty_pages("bf16"), torch.tensor([0]), torch.zeros(1, 64), torch.zeros(1, 6))
    with pytest.raises(OpError, match="slots has shape"):
        write_latents(empty_pages("bf16"), torch.tensor([0]), torch.zeros(2, 20), torch.zeros(2, 6))


def row_bytes(pages: torch.Tensor) -> torch.Tensor:
    return pages.flatten(0, 1).view(torch.uint8)


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (20, 6), (200, 0), (129, 16)])
def test_the_bytes_written_are_those_of_encode_latents(
    fmt: KVFormat, dtype: torch.dtype, latent_dim: int, rope_dim: int
) -> None:
    tokens = 40
    values = (torch.randn(tokens, 3 + latent_dim + rope_dim) * 10 ** torch.linspace(-7, 5, tokens)[:, None]).to(dtype)
    values[3] = 0
    values[4] *= 1e6
    c, k_rope = values[:, 3:].split([latent_dim, rope_dim], dim=1)
    expected = encode_latents(c, k_rope, fmt)
    pages = torch.full((6, 8, expected.shape[1]), 77).to(storage_dtype(fmt))
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:tokens]
    write_latents(pages, slots, c, k_rope, kv_format=fmt)
    if fmt in FLOAT_DTYPES:
        width = latent_dim + rope_dim
        assert (pages.flatten(0, 1)[:, width:] == 77).all()
        pages, expected = pages[..., :width].contiguous(), expected[:, :width].contiguous()
    assert torch.equal(row_bytes(pages)[slots], expected.view(torch.uint8))
    untouched = torch.ones(48, dtype=torch.bool).index_fill_(0, slots, False)
    assert (pages.flatten(0, 1)[untouched] == 77).all()


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_no_number_stays_in_its_group(fmt: KVFormat, bad: float) -> None:
    pages = torch.zeros(1, 2, latent_token_bytes(fmt, 256, 16) // storage_dtype(fmt).itemsize, dtype=storage_dtype(fmt))
    c = torch.randn(2, 256)
    c[0, 130] = bad
    write_latents(pages, torch.tensor([0, 1]), c, torch.randn(2, 16), kv_format=fmt)
    read = decode_latents(pages[0], fmt, 256, 16)
    assert read[1].isfinite().all()
    assert read[0, :128].isfinite().all()
    assert read[0, 256:].isfinite().all()
    assert not read[0, 130].isfinite()
    if fmt == "int8":
        assert read[0, 128:256].isnan().all()


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("fmt", [*KV_FORMATS, None])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 45])
def test_norm_rope_write_equals_its_three_steps(fmt: KVFormat | None, interleaved: bool, tokens: int) -> None:
    kv_a = torch.randn(tokens, 10 + 136 + 16).bfloat16()[:, 10:]
    weight, phase = torch.randn(136).bfloat16(), torch.randn(tokens, 8)
    cos, sin = phase.cos(), phase.sin()
    dtype = torch.bfloat16 if fmt is None else storage_dtype(fmt)
    fused = torch.zeros(12, 4, latent_token_bytes(fmt or "bf16", 136, 16) // dtype.itemsize, dtype=dtype)
    stepwise, slots = fused.clone(), torch.arange(tokens).flip(0)
    norm_rope_write(fused, slots, kv_a, weight, 1e-6, cos, sin, interleaved=interleaved, kv_format=fmt)
    k_rope = apply_rope(kv_a[:, 136:], cos, sin, interleaved=interleaved)
    write_latents(stepwise, slots, rms_norm(kv_a[:, :136], weight, 1e-6), k_rope, kv_format=fmt)
    assert torch.equal(row_bytes(fused), row_bytes(stepwise))


@pytest.mark.parametrize("slot", [-1, 20])
def test_slots_outside_the_cache_are_refused_before_anything_is_written(slot: int) -> None:
    pages = empty_pages("bf16")
    slots = torch.tensor([3, slot])
    with pytest.raises(OpError, match=f"slot {slot} is not one of the cache's 20"):
        write_latents(pages, slots, torch.ones(2, 20), torch.ones(2, 6), kv_format="bf16")
    angles = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(OpError, match=f"slot {slot} is not one of the cache's 20"):
        norm_rope_write(pages, slots, torch.ones(2, 26), torch.ones(20), 1e-6, *angles, interleaved=True)
    assert not pages.any()


def test_what_norm_rope_write_cannot_write_is_refused() -> None:
    pages, slots, angles = empty_pages("bf16"), torch.tensor([0]), (torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(OpError, match="leave 5, not an even number"):
        norm_rope_write(pages, slots, torch.ones(1, 25), torch.ones(20), 1e-6, *angles, interleaved=True)
    with pytest.raises(OpError, match="cos has shape"):
        norm_rope_write(pages, slots, torch.ones(1, 24), torch.ones(20), 1e-6, *angles, interleaved=True)
    with pytest.raises(OpError, match="too narrow"):
        norm_rope_write(pages, slots, torch.ones(1, 56), torch.ones(50), 1e-6, *angles, interleaved=True)
