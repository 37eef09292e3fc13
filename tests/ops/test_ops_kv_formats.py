"""What a cached token costs in bytes and how closely each format keeps its numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import assert_meets_bar, mla_case, token_slots
from torch import Tensor

from latentkv.errors import OpError
from latentkv.kernels import available_backends, use_backend
from latentkv.ops import (
    KVFormat,
    decode_latents,
    encode_latents,
    latent_payload_bytes,
    latent_token_bytes,
    mla_attend,
    reference,
    write_latents,
)
from latentkv.ops.kv_formats import KV_FORMATS

TINY_FLOAT16 = 2.0**-24


def random_latents(tokens: int, latent_dim: int, rope_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    spread = torch.rand(tokens, 1, generator=gen) * 4 - 2  # rows of very different sizes
    return (torch.randn(tokens, dim, generator=gen) * 10**spread for dim in (latent_dim, rope_dim))  # type: ignore


def group_absmax(values: Tensor, size: int = 128) -> Tensor:
    """Each number's largest neighbour: the magnitude that its group's scale comes from."""
    return torch.cat([g.abs().amax(dim=1, keepdim=True).expand_as(g) for g in values.split(size, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("fmt", "payload", "row"),
    [("fp32", 2304, 2304), ("bf16", 1152, 1152), ("fp16", 1152, 1152), ("fp8", 656, 656), ("int8", 586, 592)],
)
def test_a_deepseek_token_takes_the_published_bytes(fmt: KVFormat, payload: int, row: int) -> None:
    assert latent_payload_bytes(fmt, 512, 64) == payload
    assert latent_token_bytes(fmt, 512, 64) == row


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (256, 32), (96, 16), (130, 6), (1, 2), (40, 0)])
def test_encoded_rows_have_exactly_the_bytes_promised(fmt: KVFormat, latent_dim: int, rope_dim: int) -> None:
    rows = encode_latents(*random_latents(3, latent_dim, rope_dim), fmt)
    assert rows.shape[1] * rows.dtype.itemsize == latent_token_bytes(fmt, latent_dim, rope_dim)
    assert latent_token_bytes(fmt, latent_dim, rope_dim) % 16 == 0
    decoded = decode_latents(rows, fmt, latent_dim, rope_dim, torch.float64)
    assert torch.equal(decoded, reference.decode_latents(rows, fmt, latent_dim, rope_dim))


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_a_decoded_token_encodes_to_the_same_row_again(fmt: KVFormat) -> None:
    rows = encode_latents(*random_latents(50, 200, 24), fmt)
    decoded = decode_latents(rows, fmt, 200, 24)
    again = decode_latents(encode_latents(decoded[:, :200], decoded[:, 200:], fmt), fmt, 200, 24)
    torch.testing.assert_close(again, decoded, atol=0, rtol=0 if fmt != "int8" else 1e-3)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_to_half_precision_rounds_once(fmt: KVFormat, dtype: torch.dtype) -> None:
    rows = encode_latents(*random_latents(5, 200, 24), fmt)
    assert torch.equal(decode_latents(rows, fmt, 200, 24, dtype), decode_latents(rows, fmt, 200, 24).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    latent_dim=st.integers(1, 300),
    rope_dim=st.integers(1, 70),
    magnitude=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_int8_keeps_each_number_within_half_a_step_of_its_group(
    latent_dim: int, rope_dim: int, magnitude: float, seed: int
) -> None:
    c, k_rope = (t * 10**magnitude for t in random_latents(4, latent_dim, rope_dim, seed))
    decoded = decode_latents(encode_latents(c, k_rope, "int8"), "int8", latent_dim, rope_dim)
    for exact, kept in ((c, decoded[:, :latent_dim]), (k_rope, decoded[:, latent_dim:])):
        step = group_absmax(exact, 128 if exact is c else rope_dim) / 127
        # Half a step, and as much again as rounding the scale to float16 moves the largest code.
        assert bool(((kept - exact).abs() <= step * (0.5 + 127 * 2**-11) + TINY_FLOAT16).all())


@settings(max_examples=60, deadline=None)
@given(latent_dim=st.integers(1, 300), rope_dim=st.integers(1, 70), seed=st.integers(0, 1000))
def test_fp8_keeps_latents_to_three_bits_and_rope_to_bf16(latent_dim: int, rope_dim: int, seed: int) -> None:
    c, k_rope = random_latents(4, latent_dim, rope_dim, seed)
    decoded = decode_latents(encode_latents(c, k_rope, "fp8"), "fp8", latent_dim, rope_dim)
    assert torch.equal(decoded[:, latent_dim:], k_rope.bfloat16().float())
    # Relative 2^-4; below e4m3's normal range a fixed step of 2^-9 times the scale, which is under 2 absmax / 448.
    allowed = torch.maximum(c.abs() * 2**-4, group_absmax(c) * 2 / 448 * 2**-10)
    assert bool(((decoded[:, :latent_dim] - c).abs() <= allowed).all())


def test_fp8_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    c = torch.tensor([[448.0], [448.1], [224.0], [1.0], [0.0]])
    scales = encode_latents(c, torch.zeros(5, 2), "fp8")[:, 1:5].clone().view(torch.float32).flatten().tolist()
    assert scales[:4] == [1.0, 2.0, 0.5, 2.0**-8]
    assert scales[4] > 0


def test_every_e4m3_code_decodes_as_torch_casts_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    rows = torch.cat([codes, torch.tensor([1.0, 1.0]).view(torch.uint8)])[None]
    expected = codes.view(torch.float8_e4m3fn).float()
    decoded = decode_latents(rows, "fp8", 256, 0)[0]
    real = ~expected.isnan()
    assert int(real.sum()) == 254
    assert torch.equal(decoded[real], expected[real])


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_zeros_stay_zero_and_extreme_rows_stay_finite(fmt: KVFormat) -> None:
    c = torch.zeros(5, 160)
    c[1], c[2, 3], c[3], c[4, 0] = 1e-30, 5e-7, -6e4, 1e36
    k_rope = c[:, :8].clamp(-1e4, 1e4)
    decoded = decode_latents(encode_latents(c, k_rope, fmt), fmt, 160, 8)
    assert bool(torch.isfinite(decoded).all())
    assert decoded[0].abs().sum() == 0
    assert decoded[2, 3].item() == pytest.approx(5e-7, rel=0.07, abs=TINY_FLOAT16)
    assert decoded[3, 0].item() == pytest.approx(-6e4, rel=0.07)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_a_nan_latent_is_not_hidden_by_quantisation(fmt: KVFormat) -> None:
    c = torch.zeros(1, 64)
    c[0, 5] = float("nan")
    assert bool(decode_latents(encode_latents(c, torch.zeros(1, 8), fmt), fmt, 64, 8).isnan().any())


def int8_parts(c: list[float]) -> tuple[list[int], list[float]]:
    """Codes of one group of latents, and the scales of it and of an empty rotated key."""
    row = encode_latents(torch.tensor([c]), torch.zeros(1, 0), "int8")[0]
    scales = row[len(c) : len(c) + 4].clone().view(torch.float16)
    return row[: len(c)].view(torch.int8).tolist(), scales.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_marks_a_group_that_is_not_finite_by_an_infinite_scale(bad: float) -> None:
    assert int8_parts([1.0, bad, -2.0]) == ([0, 0, 0], [float("inf"), 0.0])
    c = torch.ones(1, 300)
    c[0, 200] = bad
    for k_rope in (torch.ones(1, 8), torch.full((1, 8), bad)):
        decoded = decode_latents(encode_latents(c, k_rope, "int8"), "int8", 300, 8)[0]
        for part, finite in ((decoded[:128], True), (decoded[128:256], False), (decoded[256:300], True)):
            assert bool(part.isfinite().all()) == finite
            assert bool(part.isnan().all()) != finite
        assert bool(decoded[300:].isfinite().all()) == (k_rope[0, 0] == 1)


@pytest.mark.parametrize(
    ("c", "codes", "scale"),
    [
        ([127.0, -63.5, 1.0], [127, -64, 1], 1.0),  # ties to even
        ([127 * 65504.0, 65504.0 * 3], [127, 3], 65504.0),  # the largest that a float16 scale carries
        ([1e9, -1e30, 65504.0], [127, -127, 1], 65504.0),  # beyond it finite numbers are clipped, and stay finite
        ([2.0**-24, -(2.0**-20)], [1, -16], 2.0**-24),  # the least scale that there is
        ([2.0**-26, 0.0], [0, 0], 2.0**-24),  # less than half of it rounds to nothing
        ([1e-40, -1e-45], [0, 0], 2.0**-24),  # numbers that are subnormal themselves
        ([0.0, -0.0], [0, 0], 0.0),
    ],
)
def test_int8_codes_and_scales_by_hand(c: list[float], codes: list[int], scale: float) -> None:
    assert int8_parts(c) == (codes, [scale, 0.0])
    decoded = decode_latents(encode_latents(torch.tensor([c]), torch.zeros(1, 0), "int8"), "int8", len(c), 0)
    assert decoded.tolist() == [[code * scale for code in codes]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_attention_over_a_token_that_is_not_finite_is_not_finite(fmt: KVFormat, bad: float) -> None:
    for backend in available_backends():
        for heads in (2, 16):
            shape = {"heads": heads, "latent_dim": 128, "rope_dim": 16, "dtype": torch.float32}
            case = mla_case([1], [9], kv_format=fmt, **shape)
            c, k_rope = torch.zeros(1, 128), torch.zeros(1, 16)
            c[0, 3] = bad
            slot = token_slots(case.table, 0, 9, 16)[4:5]
            with use_backend(backend):
                write_latents(case.pages, slot, c, k_rope, kv_format=fmt)
                out, _ = mla_attend(*case.args, latent_dim=128, scale=0.1, kv_format=fmt)
            assert not out[..., 3].isfinite().any()


def test_float16_numbers_are_decoded_from_fp8_without_overflow_of_their_scale() -> None:
    """448 * 256 needs a scale of 2^8; 256 beside it is a float16, and zero is zero."""
    rows = encode_latents(torch.tensor([[448.0 * 256, 256.0, 0.0, 2.0**-9]]), torch.zeros(1, 0), "fp8")
    decoded = decode_latents(rows, "fp8", 4, 0, torch.float16)
    assert decoded.tolist() == [[float("inf"), 256.0, 0.0, 0.0]]
    tiny = encode_latents(torch.tensor([[2.0**-14, 0.0]]), torch.zeros(1, 0), "fp8")
    assert decode_latents(tiny, "fp8", 2, 0, torch.float16).tolist() == [[2.0**-14, 0.0]]


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_attention_on_stored_pages_equals_attention_on_the_decoded_values(fmt: KVFormat) -> None:
    case = mla_case([1, 3], [70, 40], heads=5, latent_dim=192, rope_dim=20, dtype=torch.float32, kv_format=fmt)
    options = {"latent_dim": 192, "scale": 1.0}
    result = mla_attend(*case.args, **options, kv_format=fmt)
    assert_meets_bar(result, reference.mla_attend(*case.args, **options, kv_format=fmt))
    decoded = decode_latents(case.pages.flatten(0, 1), fmt, 192, 20).view(*case.pages.shape[:2], 212)
    on_decoded = mla_attend(case.q, decoded.contiguous(), *case.args[2:], **options)
    torch.testing.assert_close(result, on_decoded, atol=1e-7, rtol=1e-6)


def test_an_unknown_format_and_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(OpError, match="unknown cache format 'fp4'; choose one of fp32"):
        latent_token_bytes("fp4", 512, 64)  # type: ignore[arg-type]
    with pytest.raises(OpError, match="fp8 rows of 512 latents"):
        decode_latents(torch.zeros(2, 600, dtype=torch.uint8), "fp8", 512, 64)
    with pytest.raises(OpError, match="k_rope has shape"):
        encode_latents(torch.zeros(2, 8), torch.zeros(3, 4), "bf16")
