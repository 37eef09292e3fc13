"""GGUF's codes in the memory that kernels read: what they are, and what products with them give."""

from __future__ import annotations

import pytest
import torch
from test_gguf_types import oracle, random_rows

from latentkv import kernels
from latentkv.ops import linear
from latentkv.weights.gguf.types import TYPES, TensorType
from latentkv.weights.layout import pack_weight, unpack_weight

CODED = [kind for kind in TYPES.values() if kind.coded]
# A scale as the file has it, not in two parts.
ONE_SCALE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
BITS = {
    **dict.fromkeys(("Q4_0", "Q4_K"), ("int4", "uint4")),
    **{"Q4_1": ("uint4",), "Q5_0": ("int5",), "Q5_1": ("uint5",), "Q5_K": ("uint5",), "Q6_K": ("int6",)},
    **{
        "Q2_K": ("uint2",),
        "Q3_K": ("int4",),
        "IQ4_NL": ("nl4",),
        "IQ4_XS": ("nl4",),
        "MXFP4": ("fp4",),
        "NVFP4": ("fp4",),
    },
    **dict.fromkeys(("IQ1_S", "IQ3_S"), ("int5",)),
    **dict.fromkeys(("IQ1_M", "IQ3_XXS"), ("int6",)),
    **{"TQ1_0": ("int4",), "TQ2_0": ("int4",)},
}

every_coded_type = pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)


def typical(kind: TensorType, rows: int, blocks: int) -> torch.Tensor:
    """Any codes, and scales as models have them."""
    raw = random_rows(kind, rows, blocks).view(rows, blocks, kind.nbytes)
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "TQ1_0": (52,),
        "TQ2_0": (64,),
    }
    if kind.name == "IQ1_M":  # whose four words have 4 bits each of it
        scale = (torch.rand(rows, blocks, 1) * 0.01 + 0.001).half().view(torch.int16).int()
        raw[..., 49:56:2] = (raw[..., 49:56:2] & 15) | ((scale >> torch.arange(0, 16, 4)) & 15).to(torch.uint8) << 4
    elif kind.name == "MXFP4":
        raw[..., 0] = torch.randint(120, 126, raw.shape[:2])
    elif kind.name != "NVFP4":
        for at in halves.get(kind.name, (0,)):
            raw[..., at : at + 2] = (torch.rand(rows, blocks, 1) * 0.01 + 0.001).half().view(torch.uint8)
    return raw.flatten(1)


def test_every_type_but_plain_numbers_is_kept_as_codes() -> None:
    assert [kind.name for kind in TYPES.values() if kind.decode and not kind.coded] == ["F32", "F16", "BF16"]


def test_codes_of_runs_and_of_three_levels_take_more_memory_than_the_file() -> None:
    assert {kind.name: kind.code_bits for kind in CODED if kind.is_widened} == {
        **{"IQ1_S": 5, "IQ1_M": 6, "IQ2_XXS": 8, "IQ2_XS": 8, "IQ2_S": 8, "IQ3_XXS": 6, "IQ3_S": 5},
        **{"TQ1_0": 4, "TQ2_0": 4},
    }


@every_coded_type
def test_the_weight_in_memory_is_the_files_but_for_the_rounding_of_two_part_scales(kind: TensorType) -> None:
    raw = typical(kind, 5, 3)
    assert kind.coded is not None
    blocks = kind.coded(raw.view(-1, kind.nbytes))
    weight, exact = blocks.as_weight(5), oracle(raw, kind)
    packed = pack_weight(weight)
    assert packed.format in BITS.get(kind.name, ("int8",))
    assert torch.equal(unpack_weight(packed), weight.dequantize())
    if kind.name in ONE_SCALE:
        assert torch.equal(weight.dequantize(), exact)
        return
    assert weight.scales.dtype == torch.float16
    sizes = blocks.format.values(blocks.codes).view(5, -1).abs() * weight.scales.float().abs().repeat_interleave(
        weight.group, 1
    )
    if weight.minima is not None:
        sizes += weight.minima.float().abs().repeat_interleave(weight.group, 1)
    assert ((weight.dequantize() - exact).abs() <= 2**-11 * sizes).all()


@every_coded_type
def test_scales_that_float16_has_not_all_bits_of_stay_float32(kind: TensorType) -> None:
    raw = random_rows(kind, 4, 2)
    assert kind.coded is not None
    weight = kind.coded(raw.view(-1, kind.nbytes)).as_weight(4)
    exact = oracle(raw, kind)
    if weight.scales.dtype == torch.float32:
        assert torch.equal(weight.dequantize(), exact)
        assert torch.equal(unpack_weight(pack_weight(weight)), exact)


@every_coded_type
def test_products_are_those_with_the_files_weights(kind: TensorType) -> None:
    raw = typical(kind, 40, 2)
    assert kind.coded is not None
    packed = pack_weight(kind.coded(raw.view(-1, kind.nbytes)).as_weight(40))
    exact = oracle(raw, kind).double()
    x = torch.randn(3, exact.shape[1]).bfloat16()
    for backend in kernels.available_backends():
        with kernels.use_backend(backend):
            found = linear(x, packed, out_dtype=torch.float32).double()
        assert ((found - x.double() @ exact.T).abs() <= 2**-11 * (x.double().abs() @ exact.abs().T) + 1e-4).all()
