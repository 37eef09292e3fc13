"""Packing loses nothing."""

from __future__ import annotations

import pytest
import torch

from latentkv.errors import OpError
from latentkv.ops.packed import pack_weight, unpack_weight
from latentkv.ops.weight_formats import QuantizedWeight, quantize_weight

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
    quantised = quantize_weight(weight, "int8" if fmt == "int8" else "int4", group)
    packed = pack_weight(quantised)
    assert torch.equal(unpack_weight(packed), quantised.dequantize())
    assert (packed.format, packed.out_features, packed.in_features) == (fmt, *shape[-2:])


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -128, 127), (4, -8, 7)])
def test_every_code_comes_back(bits: int, low: int, high: int) -> None:
    codes = torch.arange(low, high + 1, dtype=torch.int8).repeat(3, 1)
    quantised = QuantizedWeight(codes, torch.full((3, 1), 0.5, dtype=torch.bfloat16), bits, codes.shape[1])
    assert torch.equal(unpack_weight(pack_weight(quantised)), codes / 2)


def test_kernels_find_the_data_aligned_to_cache_lines() -> None:
    for out_features in (1, 33, 4096):
        packed = pack_weight(torch.zeros(3, out_features, 260))
        assert packed.data.data_ptr() % 64 == 0
        assert packed.matrix(1).data.data_ptr() % 64 == 0


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(OpError, match=r"\[O, D\]"):
        pack_weight(torch.zeros(3))
    with pytest.raises(OpError, match="bfloat16 or float32"):
        pack_weight(torch.zeros(3, 4, dtype=torch.float16))
    codes = torch.zeros(3, 40, dtype=torch.int8)
    with pytest.raises(OpError, match="multiple of 8"):
        pack_weight(QuantizedWeight(codes, torch.ones(3, 4, dtype=torch.bfloat16), 4, 12))
