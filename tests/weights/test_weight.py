"""Quantised weights: what they stand for, and that the search never loses to plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentkv.errors import OpError
from latentkv.ops import reference
from latentkv.weights.formats import INT8
from latentkv.weights.weight import GROUP_SIZES, QuantizedWeight, quantize_weight

FORMATS = [("int8", None), *(("int8", g) for g in GROUP_SIZES), *(("int4", g) for g in (None, *GROUP_SIZES))]


def some_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy-tailed, as trained weights are, with rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    normal, tail = (torch.randn(shape, generator=generator) for _ in range(2))
    size = torch.rand(*shape[:-1], 1, generator=generator) * 8 - 4
    return (normal * (1 + tail.abs() ** 3 / 4) * size.exp()).to(dtype)


def plainly_rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """float64: each group rounded with the scale max|w| / 7 or max|w| / 127 in bfloat16."""
    high = 7 if bits == 4 else 127
    parts = []
    for part in weight.float().split(group, dim=-1):
        scale = (part.abs().amax(-1, keepdim=True) / high).bfloat16().double()
        parts.append((part / scale).round().clamp(-high - (bits == 4), high) * scale)
    return torch.cat(parts, dim=-1)


def group_errors(error: torch.Tensor, group: int) -> torch.Tensor:
    return torch.stack([part.square().sum(-1) for part in error.double().split(group, dim=-1)], dim=-1)


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(5, 256), (3, 4, 200), (2, 7), (1, 1)])
def test_codes_and_scales_have_their_shape_and_range(fmt, group, shape):
    quantized = quantize_weight(some_weight(*shape), fmt, group)
    assert quantized.group == (group or (shape[-1] if fmt == "int8" else 128))
    assert quantized.format.name == fmt
    assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == shape
    assert quantized.scales.dtype == torch.bfloat16
    assert quantized.scales.shape == (*shape[:-1], -(-shape[-1] // quantized.group))
    low, high = (-8, 7) if fmt == "int4" else (-127, 127)
    assert low <= quantized.codes.min() and quantized.codes.max() <= high


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    choice=st.sampled_from(FORMATS),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_group_is_further_off_than_by_plain_rounding(rows, columns, choice, seed, dtype):
    weight = some_weight(rows, columns, seed=seed, dtype=dtype)
    quantized = quantize_weight(weight, *choice)
    errors = group_errors(quantized.dequantize(torch.float64) - weight, quantized.group)
    plain = group_errors(plainly_rounded(weight, quantized.format.bits, quantized.group) - weight, quantized.group)
    assert (errors <= plain * (1 + 1e-5)).all()


def test_the_search_pays():
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for fmt, group, part in (("int4", 128, 0.69), ("int4", 32, 0.72), ("int8", None, 0.985)):
        quantized = quantize_weight(weight, fmt, group)
        errors = (quantized.dequantize() - weight).square().sum()
        plain = (plainly_rounded(weight, quantized.format.bits, quantized.group) - weight).square().sum()
        assert errors < part * plain


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(5, 256), (3, 4, 200)])
def test_dequantising_is_the_reference(fmt, group, shape):
    quantized = quantize_weight(some_weight(*shape), fmt, group)
    expected = reference.dequantize_weight(quantized.codes, quantized.scales, quantized.group)
    assert torch.equal(quantized.dequantize().double(), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(quantized.dequantize(dtype), expected.to(dtype))


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_what_integers_can_say_comes_back_exactly(fmt, group):
    high = 7 if fmt == "int4" else 127
    codes = torch.randint(-high, high + 1, (6, 384), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = high
    weight = codes * torch.tensor([1.0, 0.5, 3.0, 2.0**-20, 1e-3, 7.0]).bfloat16()[:, None].float()
    assert torch.equal(quantize_weight(weight, fmt, group).dequantize(), weight)


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_threads():
    weight = some_weight(700, 1024)
    whole = quantize_weight(weight, "int4")
    alone = quantize_weight(weight[650:651], "int4")
    assert torch.equal(whole.codes[650:651], alone.codes) and torch.equal(whole.scales[650:651], alone.scales)
    torch.set_num_threads(2)
    try:
        assert torch.equal(quantize_weight(weight, "int4").codes, whole.codes)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_zeros_and_numbers_too_small_for_a_scale_become_zeros(fmt, group):
    weight = some_weight(4, 256)
    weight[1], weight[2], weight[3, :128] = 0.0, 1e-44, 0.0
    quantized = quantize_weight(weight, fmt, group)
    restored = quantized.dequantize()
    assert not restored[1:3].any() and not restored[3, :128].any()
    assert restored[0].any() and torch.isfinite(quantized.scales).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("fmt", "group"), FORMATS)
def test_nan_and_infinity_are_refused(fmt, group, bad):
    weight = some_weight(4, 200)
    weight[2, 150] = bad
    with pytest.raises(OpError, match="NaN or infinite"):
        quantize_weight(weight, fmt, group)


def test_wrong_arguments_are_refused():
    weight = some_weight(4, 64)
    for arguments, words in (
        ((weight, "int3"), "int3"),
        ((weight, "int4", 48), "groups of 48"),
        ((weight, "int8", -1), "groups of -1"),
        ((weight[0], "int8"), r"\[\.\.\., O, D\]"),
        ((weight.int(), "int8"), "int32"),
        ((weight[:0], "int8"), r"\[0, 64\]"),
    ):
        with pytest.raises(OpError, match=words):
            quantize_weight(*arguments)


def test_bytes_are_those_of_packed_codes_and_scales():
    assert quantize_weight(some_weight(3, 200), "int4").nbytes == 300 + 3 * 2 * 2
    assert quantize_weight(some_weight(3, 200), "int8").nbytes == 600 + 3 * 2


def test_foreign_codes_use_the_whole_byte():
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.tensor([[0.5]], dtype=torch.bfloat16), INT8, 2)
    assert weight.dequantize().tolist() == [[-64.0, 63.5]]
