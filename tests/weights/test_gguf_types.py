"""GGUF's types, held to the gguf package bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from latentkv.errors import CheckpointError, OpError
from latentkv.weights.gguf.grids import grid
from latentkv.weights.gguf.types import TYPES, TensorType, dequantize, describe_unread, readable_names

WEIGHTS = [kind for kind in TYPES.values() if kind.decode]
BY_NAME = {kind.name: kind for kind in TYPES.values()}
# Where a block's own float16 numbers are.
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
# Where else the top bit of an exponent is, less one: numbers without a block, and one that is in pieces.
LAST_BYTES = {"F32": (2,), "F16": (0,), "BF16": (0,), "IQ1_M": (54,)}
# Zero, minus zero, the least number, a subnormal one, the largest and the lowest, as float16.
SCALES = (0, 0x8000, 1, 0x83FF, 0x7BFF, 0xFBFF)
FILLS = (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x3F, 0xC0)

every_type = pytest.mark.parametrize("kind", WEIGHTS, ids=lambda kind: kind.name)


def oracle(raw: Tensor, kind: TensorType) -> Tensor:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.id))
    return torch.from_numpy(values.copy())


def assert_same_bits(raw: Tensor, kind: TensorType) -> None:
    found, expected = dequantize(raw, kind), oracle(raw, kind)
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def finite(raw: Tensor, kind: TensorType) -> Tensor:
    """The same rows, without float16 and other numbers whose exponent is all ones."""
    blocks = raw.view(len(raw), -1, kind.nbytes)
    for at in (*HALVES.get(kind.name, ()), *LAST_BYTES.get(kind.name, ())):
        blocks[..., at + 1] &= 0xBF
    return blocks.flatten(1)


def random_rows(kind: TensorType, rows: int, blocks: int) -> Tensor:
    """Any bits, but finite scales."""
    return finite(torch.randint(256, (rows, blocks * kind.nbytes), dtype=torch.uint8), kind)


def with_scale(raw: Tensor, kind: TensorType, bits: int) -> Tensor:
    """The same rows with the float16 numbers of every block replaced."""
    blocks = raw.clone().view(len(raw), -1, kind.nbytes)
    for at in HALVES.get(kind.name, ()):
        blocks[..., at], blocks[..., at + 1] = bits & 255, bits >> 8
    if kind.name == "IQ1_M":
        for word in range(4):
            blocks[..., 49 + 2 * word] = (blocks[..., 49 + 2 * word] & 15) | (bits >> 4 * word & 15) << 4
    return blocks.flatten(1)


@every_type
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 5), (3, 5), (37, 5)])
def test_any_bits_mean_what_ggml_says(kind: TensorType, rows: int, blocks: int) -> None:
    assert_same_bits(random_rows(kind, rows, blocks), kind)


@every_type
def test_extreme_blocks_mean_what_ggml_says(kind: TensorType) -> None:
    blocks = [finite(torch.full((1, 3 * kind.nbytes), fill, dtype=torch.uint8), kind) for fill in FILLS]
    for raw in (*blocks, random_rows(kind, 1, 16)):
        for scale in SCALES:
            assert_same_bits(with_scale(raw, kind, scale), kind)


@every_type
def test_scales_that_are_no_numbers_stay_none(kind: TensorType) -> None:
    raw = torch.randint(256, (64, 8 * kind.nbytes), dtype=torch.uint8)
    raw[:32] = with_scale(raw[:32], kind, 0x7C00)
    found, expected = dequantize(raw, kind), oracle(raw, kind)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_every_number_of_16_bits_is_read() -> None:
    raw = torch.arange(65536).to(torch.int32).short().view(torch.uint8).view(64, -1)
    assert_same_bits(raw, BY_NAME["BF16"])
    found, expected = dequantize(raw, BY_NAME["F16"]), oracle(raw, BY_NAME["F16"])
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
    assert bool(same.all())


@pytest.mark.parametrize(("name", "at"), [("MXFP4", 0), ("NVFP4", 3)])
def test_every_scale_of_8_bits_is_read(name: str, at: int) -> None:
    kind = BY_NAME[name]
    raw = torch.arange(256 * kind.nbytes).to(torch.uint8).view(256, kind.nbytes)
    raw[:, at] = torch.arange(256).to(torch.uint8)
    assert_same_bits(raw, kind)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("IQ1", "IQ1_S"), *((name, name) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))],
)
def test_codebooks_are_those_of_ggml(name: str, theirs: str) -> None:
    book = getattr(gguf.quants, theirs)
    book.init_grid()
    assert torch.equal(grid(name), torch.from_numpy(book.grid).view(book.grid_shape))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
def test_rows_longer_and_more_than_a_chunk_are_whole(name: str) -> None:
    kind = BY_NAME[name]
    assert_same_bits(random_rows(kind, 3, 66_048 // kind.weights), kind)
    assert_same_bits(random_rows(kind, 1, 140_032 // kind.weights), kind)


def test_temporaries_are_small_however_long_the_rows() -> None:
    sizes: list[int] = []
    kind = BY_NAME["Q8_0"]

    def counted(blocks: Tensor) -> Tensor:
        sizes.append(len(blocks) * kind.weights)
        return torch.zeros(len(blocks), kind.weights)

    dequantize(random_rows(kind, 3, 10_000), replace(kind, decode=counted))
    assert sum(sizes) == 3 * 10_000 * kind.weights
    assert max(sizes) <= 1 << 17


@every_type
def test_no_rows_and_rows_apart_are_read(kind: TensorType) -> None:
    raw = random_rows(kind, 6, 4)
    assert dequantize(raw[:0], kind).shape == (0, 4 * kind.weights)
    assert torch.equal(dequantize(raw[::2], kind), dequantize(raw, kind)[::2])
    assert torch.equal(dequantize(raw[:, : 2 * kind.nbytes], kind), dequantize(raw, kind)[:, : 2 * kind.weights])


@every_type
def test_what_was_read_is_not_changed(kind: TensorType) -> None:
    raw = random_rows(kind, 3, 2)
    before = raw.clone()
    dequantize(raw, kind).zero_()
    assert torch.equal(raw, before)


def test_sizes_and_names_are_those_of_ggml() -> None:
    for kind in TYPES.values():
        known = gguf.GGMLQuantizationType(kind.id)
        assert (kind.name, kind.weights, kind.nbytes) == (known.name, *gguf.GGML_QUANT_SIZES[known])
    assert BY_NAME["Q4_K"].bits_per_weight == 4.5


def test_types_that_are_not_read_are_called_by_their_names() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert kind.value in TYPES or describe_unread(kind.value).startswith(kind.name)
    assert describe_unread(139) == "IQ4_K, which ik_llama.cpp alone has"
    assert describe_unread(31).startswith("Q4_0_4_4, which llama.cpp itself no longer reads")
    assert describe_unread(999) == "type number 999, which is not known"


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_numbers_that_are_no_weights_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{name} is no type of weights: .* F32, F16, Q4_0.* NVFP4$"):
        dequantize(torch.zeros(1, 8, dtype=torch.uint8), BY_NAME[name])
    assert name not in readable_names().split(", ")


@pytest.mark.parametrize(
    "raw",
    [torch.zeros(18), torch.zeros(1, 18), torch.zeros(1, 17, dtype=torch.uint8), torch.zeros(18, dtype=torch.uint8)],
)
def test_rows_of_another_kind_are_refused(raw: Any) -> None:
    with pytest.raises(OpError, match="rows of Q4_0 are uint8"):
        dequantize(raw, BY_NAME["Q4_0"])
