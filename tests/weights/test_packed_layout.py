"""Packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops import linear
from latentkv.weights.formats import CODE_FORMATS, FP8, INT4, INT8, UINT4, CodeFormat, of_integers
from latentkv.weights.layout import pack_weight, unpack_weight
from latentkv.weights.weight import QuantizedWeight, quantize_weight
from quantised_weights import quantised

SHAPES = [(1, 1), (1, 8), (32, 64), (33, 30), (3, 17, 127), (2, 64, 256), (1000, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_comes_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(unpack_weight(pack_weight(weight)), weight.bfloat16().float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fmt", "group"), [("int8", None), ("int8", 64), ("int4", 32), ("int4", 128)])
def test_codes_and_scales_come_back(shape: tuple[int, ...], fmt: str, group: int | None) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantised = quantize_weight(weight, fmt, group)
    packed = pack_weight(quantised)
    assert torch.equal(unpack_weight(packed), quantised.dequantize())
    assert (packed.format, packed.out_features, packed.in_features) == (fmt, *shape[-2:])


@pytest.mark.parametrize("shape", [*SHAPES, (5, 96)])
@pytest.mark.parametrize(
    ("fmt", "group"),
    [
        *[("uint2", 16), ("uint4", 32), ("uint5", 32), ("uint4", 64), ("int5", 32), ("int6", 16)],
        *[("uint4 f32", 32), ("int6 f32", 16), ("int8 f32", 32), ("fp4", 32), ("fp4", 16), ("nl4 f16", 32)],
        *[("fp8", 128), ("fp8 f32", None)],
    ],
)
def test_codes_scales_and_minima_come_back(shape: tuple[int, ...], fmt: str, group: int | None) -> None:
    weight = quantised(torch.randn(shape, generator=torch.Generator().manual_seed(0)), fmt, group)
    packed = pack_weight(weight)
    assert torch.equal(unpack_weight(packed), weight.dequantize())
    assert (packed.format, packed.scales) == (fmt.split()[0], weight.scales.dtype)
    if len(shape) == 3:
        assert torch.equal(unpack_weight(packed.matrix(1)), weight.dequantize()[1])


@pytest.mark.parametrize(("bits", "group", "a_weight"), [(2, 16, 4), (4, 32, 5), (5, 32, 6)])
def test_weights_with_minima_take_their_bits_and_those_of_two_numbers_a_group(
    bits: int, group: int, a_weight: int
) -> None:
    shared = torch.ones(64, 512 // group, dtype=torch.float16)
    form = of_integers(bits, minima=True)
    weight = QuantizedWeight(torch.zeros(64, 512, dtype=torch.int8), shared, form, group, shared)
    assert pack_weight(weight).nbytes == weight.nbytes == 64 * 512 * a_weight // 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": INT4}, "int4 weights have no minima"),
        ({"minima": None}, "uint4 weights have minima"),
        ({"group": 0}, "in groups of 0"),
        ({"minima": torch.ones(4, 2)}, "minima are like scales"),
        ({"codes": torch.full((4, 64), 16, dtype=torch.int8)}, "uint4 codes are 0 to 15, not 16 to 16"),
        ({"group": 24}, "24"),
    ],
)
def test_codes_and_minima_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    shared = torch.ones(4, 2, dtype=torch.float16)
    fields = {"codes": torch.zeros(4, 64, dtype=torch.int8), "scales": shared, "format": UINT4, "group": 32}
    with pytest.raises(OpError, match=message):
        pack_weight(QuantizedWeight(**{**fields, "minima": shared, **changes}))


@pytest.mark.parametrize("form", CODE_FORMATS.values(), ids=CODE_FORMATS)
def test_every_code_comes_back_as_what_it_stands_for(form: CodeFormat) -> None:
    codes = torch.arange(form.lowest, form.highest + 1).to(torch.int8).repeat(3, 1)
    halves = torch.full((3, 1), 0.5, dtype=torch.bfloat16)
    quantised = QuantizedWeight(codes, halves, form, codes.shape[1], 3 * halves if form.has_minima else None)
    expected = torch.tensor(form.levels or range(form.lowest, form.highest + 1)) / 2 + 1.5 * form.has_minima
    assert torch.equal(unpack_weight(pack_weight(quantised)).nan_to_num(), expected.repeat(3, 1).nan_to_num())


@pytest.mark.parametrize("form", CODE_FORMATS.values(), ids=CODE_FORMATS)
def test_every_code_of_every_format_is_in_products_what_it_stands_for(form: CodeFormat) -> None:
    """An output for each place that a code can have in a pack, and an input for each output."""
    count, dtype = 2**form.bits, torch.float32
    codes = torch.arange(form.lowest, form.highest + 1).to(torch.int8)
    codes = torch.stack([codes.roll(turn) for turn in range(32)])
    if form is FP8:
        codes[form.values(codes).isnan()] = 0
    shared = torch.linspace(0.5, 2, 32)[:, None]
    weight = QuantizedWeight(codes, shared, form, count, shared / 3 if form.has_minima else None)
    x = torch.eye(count, dtype=dtype)
    for backend in kernels.available_backends():
        with kernels.use_backend(backend):
            found = linear(x, pack_weight(weight))
        torch.testing.assert_close(found.T, weight.dequantize(), rtol=1e-6, atol=1e-6 * form.highest)


needs_extension = pytest.mark.skipif(kernels.extension is None, reason="only the extension packs compact weights")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of bfloat16 numbers, however they are kept; NaNs included."""
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


@needs_extension
@pytest.mark.parametrize("shape", [(1, 640), (32, 128), (33, 127), (3, 70, 130), (1000, 130), (64, 2048)])
def test_compact_weights_come_back_bit_for_bit(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    strange = torch.tensor([0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), 3e38, 1e-30]).bfloat16()
    weight.view(-1)[torch.arange(8) * (weight.numel() // 8) + 5] = strange
    packed = pack_weight(weight, compact=True)
    assert (packed.format, packed.out_features, packed.in_features) == ("compact", *shape[-2:])
    assert same_bits(unpack_weight(packed), weight)
    if len(shape) == 3:
        assert same_bits(unpack_weight(packed.matrix(1)), weight[1])


@needs_extension
@pytest.mark.parametrize("window", [0, 2, 100, 126, 240])
def test_every_sign_exponent_and_mantissa_of_a_window_comes_back(window: int) -> None:
    bits = torch.arange(window << 7, (window + 16) << 7)
    weight = torch.cat([bits, bits | 1 << 15]).to(torch.int16).view(torch.bfloat16).view(32, 128)
    packed = pack_weight(weight, compact=True)
    assert (packed.format, packed.group) == ("compact", 0)  # nothing is outside
    assert same_bits(unpack_weight(packed), weight)


@needs_extension
def test_compact_weights_take_three_quarters_of_the_memory() -> None:
    weight = torch.randn(2, 512, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert 0.75 <= pack_weight(weight, compact=True).nbytes / weight.nbytes <= 0.755


@needs_extension
def test_stacked_matrices_have_windows_of_their_own() -> None:
    weight = (
        torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 1e-10, 1e10])[:, None, None]
    )
    packed = pack_weight(weight, compact=True)
    assert packed.format == "compact"
    assert same_bits(unpack_weight(packed), weight.bfloat16())


@needs_extension
def test_weights_of_all_sizes_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.empty(64, 256).uniform_(-40, 40, generator=generator).exp()
    rows = torch.randn(64, 256, generator=generator)
    rows[:3] *= 1e-8
    for weight in (wide, rows, rows.new_zeros(64, 256).index_fill_(0, torch.tensor([7]), 1)):
        packed = pack_weight(weight, compact=True)
        assert packed.format == "bf16"
        assert same_bits(unpack_weight(packed), weight.bfloat16())


@needs_extension
def test_few_weights_that_would_not_get_smaller_stay_as_they_are() -> None:
    assert pack_weight(torch.ones(1, 1), compact=True).format == "bf16"


def test_quantised_weights_are_not_made_compact() -> None:
    assert pack_weight(quantize_weight(torch.ones(4, 64), "int8", None), compact=True).format == "int8"


@pytest.mark.parametrize("compact", [False, True])
def test_kernels_find_the_data_aligned_to_cache_lines(compact: bool) -> None:
    for out_features in (1, 33, 4096):
        packed = pack_weight(torch.ones(3, out_features, 260), compact=compact)
        assert packed.data.data_ptr() % 64 == 0
        assert packed.matrix(1).data.data_ptr() % 64 == 0


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(OpError, match=r"\[O, D\]"):
        pack_weight(torch.zeros(3))
    with pytest.raises(OpError, match="bfloat16 or float32"):
        pack_weight(torch.zeros(3, 4, dtype=torch.float16))
    codes = torch.zeros(3, 40, dtype=torch.int8)
    with pytest.raises(OpError, match="multiple of 8"):
        pack_weight(QuantizedWeight(codes, torch.ones(3, 4, dtype=torch.bfloat16), INT4, 12))


@pytest.mark.parametrize(
    ("codes", "scales", "form", "message"),
    [
        (torch.zeros(3, 64).to(torch.int8), torch.ones(3, 2).double(), INT8, "int8 codes and .* scales, not .*float64"),
        (torch.zeros(3, 64), torch.ones(3, 2).bfloat16(), INT8, "int8 codes and .* scales, not torch.float32"),
        (torch.zeros(3, 64).to(torch.int8), torch.ones(2, 3).bfloat16(), INT8, r"take scales \[3, 2\], not \[2, 3\]"),
        (
            torch.full((3, 64), 8).to(torch.int8),
            torch.ones(3, 2).bfloat16(),
            INT4,
            "int4 codes are -8 to 7, not 8 ",
        ),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_refused(
    codes: Tensor, scales: Tensor, form: CodeFormat, message: str
) -> None:
    with pytest.raises(OpError, match=message):
        pack_weight(QuantizedWeight(codes, scales, form, 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["bf16", "compact", "int8", "int4", "fp8", "nl4"])
def test_a_weight_or_scale_that_is_not_finite_shows_in_every_product_with_it(kind: str, bad: float) -> None:
    weight = torch.full((32, 512), 0.5).bfloat16()
    packed = weight
    if kind in CODE_FORMATS:
        codes, scales = torch.full((32, 512), 3).to(torch.int8), torch.ones(32, 4).bfloat16()
        scales[5, 1] = bad
        packed = QuantizedWeight(codes, scales, CODE_FORMATS[kind], 128)
    else:
        weight[5, 200] = bad
    packed = pack_weight(packed, compact=kind == "compact")
    assert packed.format == kind or kernels.extension is None
    for backend in kernels.available_backends():
        for dtype in (torch.bfloat16, torch.float32):
            with kernels.use_backend(backend):
                out = linear(torch.ones(3, 512).to(dtype), packed)
            assert not out[:, 5].isfinite().any()
            assert out[:, [4, 6]].isfinite().all()
