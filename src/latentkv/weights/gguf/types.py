"""The types of GGUF's tensors: how many weights a block has, in how many bytes, and what they are as float32.

The float32 values are the definition of each type: ggml's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.errors import CheckpointError, OpError
from latentkv.weights.gguf import grid_blocks, k_blocks, simple_blocks, table_blocks
from latentkv.weights.gguf.coded_blocks import CodedBlocks

_CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class TensorType:
    """How a file stores numbers.

    Attributes:
        id: number of the type in files.
        name: what ggml calls it.
        weights: of a block; a row has whole blocks.
        nbytes: of a block.
        decode: blocks [B, nbytes] of uint8 to float32 [B, weights]; None where the numbers are no weights.
        coded: the same blocks to codes and scales; None where they are something else.
    """

    id: int
    name: str
    weights: int
    nbytes: int
    decode: Callable[[Tensor], Tensor] | None = None
    coded: Callable[[Tensor], CodedBlocks] | None = None

    @property
    def code_bits(self) -> int | None:
        """Bits of a code in memory; None where weights are none."""
        return None if self.coded is None else self.coded(torch.zeros(1, self.nbytes, dtype=torch.uint8)).format.bits

    @property
    def is_widened(self) -> bool:
        """Whether memory takes far more than the file: a code of several weights becomes an integer for each."""
        return (self.code_bits or 0) > 1.25 * self.bits_per_weight

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, its share of the block's scales included."""
        return self.nbytes * 8 / self.weights


def _coded(
    read: Callable[[Tensor], CodedBlocks],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], CodedBlocks]]:
    return lambda blocks: read(blocks).dequantize(), read


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype).float()


TYPES: Mapping[int, TensorType] = {
    kind.id: kind
    for kind in (
        TensorType(0, "F32", 1, 4, _as(torch.float32)),
        TensorType(1, "F16", 1, 2, _as(torch.float16)),
        TensorType(2, "Q4_0", 32, 18, *_coded(simple_blocks.q4_0)),
        TensorType(3, "Q4_1", 32, 20, *_coded(simple_blocks.q4_1)),
        TensorType(6, "Q5_0", 32, 22, *_coded(simple_blocks.q5_0)),
        TensorType(7, "Q5_1", 32, 24, *_coded(simple_blocks.q5_1)),
        TensorType(8, "Q8_0", 32, 34, *_coded(simple_blocks.q8_0)),
        TensorType(10, "Q2_K", 256, 84, *_coded(k_blocks.q2_k)),
        TensorType(11, "Q3_K", 256, 110, *_coded(k_blocks.q3_k)),
        TensorType(12, "Q4_K", 256, 144, *_coded(k_blocks.q4_k)),
        TensorType(13, "Q5_K", 256, 176, *_coded(k_blocks.q5_k)),
        TensorType(14, "Q6_K", 256, 210, *_coded(k_blocks.q6_k)),
        TensorType(16, "IQ2_XXS", 256, 66, *_coded(grid_blocks.iq2_xxs)),
        TensorType(17, "IQ2_XS", 256, 74, *_coded(grid_blocks.iq2_xs)),
        TensorType(18, "IQ3_XXS", 256, 98, *_coded(grid_blocks.iq3_xxs)),
        TensorType(19, "IQ1_S", 256, 50, *_coded(grid_blocks.iq1_s)),
        TensorType(20, "IQ4_NL", 32, 18, *_coded(table_blocks.iq4_nl)),
        TensorType(21, "IQ3_S", 256, 110, *_coded(grid_blocks.iq3_s)),
        TensorType(22, "IQ2_S", 256, 82, *_coded(grid_blocks.iq2_s)),
        TensorType(23, "IQ4_XS", 256, 136, *_coded(table_blocks.iq4_xs)),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", 256, 56, *_coded(grid_blocks.iq1_m)),
        TensorType(30, "BF16", 1, 2, _as(torch.bfloat16)),
        TensorType(34, "TQ1_0", 256, 54, *_coded(simple_blocks.tq1_0)),
        TensorType(35, "TQ2_0", 256, 66, *_coded(simple_blocks.tq2_0)),
        TensorType(39, "MXFP4", 32, 17, *_coded(table_blocks.mxfp4)),
        TensorType(40, "NVFP4", 64, 36, *_coded(table_blocks.nvfp4)),
    )
}
"""Every type that is read, by its number in files."""

_ACTIVATIONS = {9: "Q8_1", 15: "Q8_K"}
_REMOVED = {
    **{4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
}
_OTHERS = {41: "Q1_0"}
_IK_LLAMA = {
    **{133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K"},
    **{141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT"},
    **{155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
}


def describe_unread(number: int) -> str:
    """What is known of a type that is not in `TYPES`, for a sentence: its name where it has one."""
    if number in _ACTIVATIONS:
        return f"{_ACTIVATIONS[number]}, which holds activations and no weights"
    if number in _REMOVED:
        return f"{_REMOVED[number]}, which llama.cpp itself no longer reads"
    if number in _IK_LLAMA:
        return f"{_IK_LLAMA[number]}, which ik_llama.cpp alone has"
    if number in _OTHERS:
        return f"{_OTHERS[number]}, which is not supported"
    return f"type number {number}, which is not known"


def readable_names() -> str:
    """The types that `dequantize` takes, for a sentence."""
    return ", ".join(kind.name for kind in TYPES.values() if kind.decode)


def dequantize(raw: Tensor, kind: TensorType) -> Tensor:
    """The weights that rows of blocks stand for.

    Temporaries are those of about a hundred thousand weights, however many there are.

    Args:
        raw: uint8 [rows, row_bytes], whole blocks; read where it lies if it is contiguous.
        kind: one of `TYPES`.

    Returns:
        float32 [rows, n], in memory of its own.

    Raises:
        CheckpointError: numbers of this type are no weights.
        OpError: `raw` is something else.
    """
    if kind.decode is None:
        raise CheckpointError(f"{kind.name} is no type of weights: use a file whose weights are {readable_names()}")
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] % kind.nbytes:
        raise OpError(
            f"rows of {kind.name} are uint8 [rows, a multiple of {kind.nbytes}], not {raw.dtype} {list(raw.shape)}"
        )
    blocks = raw.reshape(-1, kind.nbytes)
    weights = torch.empty(len(blocks), kind.weights)
    for part in _parts(blocks, kind):
        weights[part] = kind.decode(blocks[part])
    return weights.view(len(raw), raw.shape[1] // kind.nbytes * kind.weights)


def read_codes(blocks: Tensor, kind: TensorType) -> CodedBlocks:
    """The codes and scales of blocks [B, nbytes] of uint8; temporaries are small, as those of `dequantize`.

    Raises:
        OpError: the type has no codes.
    """
    if kind.coded is None:
        raise OpError(f"{kind.name} has no codes")
    like = kind.coded(blocks[:1])
    codes = torch.empty(len(blocks), like.codes.shape[1], dtype=torch.int8)
    scales = torch.empty(len(blocks), like.scales.shape[1])
    minima = None if like.minima is None else torch.empty_like(scales)
    for part in _parts(blocks, kind):
        found = kind.coded(blocks[part])
        codes[part], scales[part] = found.codes, found.scales
        if minima is not None and found.minima is not None:
            minima[part] = found.minima
    return CodedBlocks(codes, scales, like.format, minima)


def _parts(blocks: Tensor, kind: TensorType) -> Iterator[slice]:
    step = _CHUNK_WEIGHTS // kind.weights
    return (slice(start, start + step) for start in range(0, len(blocks), step))
