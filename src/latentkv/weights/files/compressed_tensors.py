"""Quantised weights as compressed-tensors stores them, and of its format "pack-quantized", which we write, back.

There `NAME.weight` becomes `NAME.weight_packed` (codes made unsigned, 8 of 4 bits or 4 of 8 to an int32, the first
lowest), `NAME.weight_scale` [O, groups] and `NAME.weight_shape` [2]; where the zero is not 0, `NAME.weight_zero_point`
[O / 8, groups], made unsigned and packed in the same way along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.files.compressed_config import PackedSchemes
from latentkv.weights.files.four_bit_floats import NVFP4_GROUP, FourBitFloats
from latentkv.weights.files.scaled_codes import Blocks, ScaledCodes
from latentkv.weights.files.stored_weight import (
    Headers,
    Read,
    ShapeOf,
    StoredWeight,
    activation_parts,
    affine,
    require_parts,
)
from latentkv.weights.formats import FP4
from latentkv.weights.policy import WeightScheme
from latentkv.weights.weight import QuantizedWeight

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
"""What is added to a weight's name for each of its parts."""

_ZEROS = "_zero_point"
_WHOLE = "_global_scale"
_REFUSED_PARTS = ("_g_idx",)  # of weights that are quantised in ways that `QuantizedWeight` cannot hold

_CODED = {"I8": "int8", "F8_E4M3": "float8_e4m3fn"}
"""Dtypes of weights that are stored under their own name, and what to call them."""

_CHANNEL_GROUP_INT4 = 128
_BYTES_A_WORD = 4


@dataclass(frozen=True)
class CompressedWeight:
    """See `StoredWeight`.

    Attributes:
        name: of the weight.
        scheme: what the checkpoint's config says of it.
        has_zeros: there are zero points.
    """

    name: str
    scheme: WeightScheme
    has_zeros: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight`."""
        return tuple(self.name + part for part in (PACKED, SCALE, SHAPE, *([_ZEROS] if self.has_zeros else [])))

    @property
    def shown(self) -> str:
        """See `StoredWeight`."""
        return self.scheme.format.name

    @property
    def rounded(self) -> bool:
        """See `StoredWeight`."""
        return True

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """See `StoredWeight`."""
        return tuple(int(n) for n in read(self.name + SHAPE).flatten().tolist())

    def unpack(self, read: Read) -> QuantizedWeight:
        """See `StoredWeight`."""
        parts = {part.removeprefix(self.name): read(part) for part in self.parts}
        return (_unpack_with_zeros if self.has_zeros else unpack)(self.name, parts, self.scheme)


def find_compressed(headers: Headers, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Every weight that is stored quantised, by its name.

    Raises:
        CheckpointError: the config is not supported, or a weight lacks a part or has one too many.
    """
    packed = [name.removesuffix(PACKED) for name in headers if name.endswith(PACKED)]
    coded = [name for name in headers if name.endswith(".weight") and headers[name][1] in _CODED]
    schemes = PackedSchemes(config, (name.removesuffix(".weight") for name in (*packed, *coded)))
    found: dict[str, StoredWeight] = {}
    for name in (*packed, *coded):
        module = name.removesuffix(".weight")
        scheme = schemes.of(module)
        others = activation_parts(headers, module)
        for part in _REFUSED_PARTS:
            if name + part in headers:
                raise CheckpointError(f"{name}{part} says that {name} is quantised in a way that is not supported")
        if name in coded:
            require_parts([name + SCALE], headers)
            zeros = name + _ZEROS if name + _ZEROS in headers else None
            blocks = Blocks(scheme.rows, scheme.group)
            found[name] = ScaledCodes(name, name + SCALE, blocks, _CODED[headers[name][1]], zeros, others)
        elif scheme.format is FP4:
            whole = name + _WHOLE if scheme.group == NVFP4_GROUP else None
            stored = FourBitFloats(name + PACKED, name + SCALE, whole, divides=True, others=others)
            require_parts(stored.parts, headers)
            found[name] = stored
        else:
            found[name] = _packed_integers(headers, name, scheme)
    return found


def _packed_integers(headers: Headers, weight: str, scheme: WeightScheme) -> CompressedWeight:
    for part in (SCALE, SHAPE):
        if weight + part not in headers:
            raise CheckpointError(f"packed weight {weight}{PACKED} has no {weight}{part} beside it: download it again")
    if weight + _WHOLE in headers:
        raise CheckpointError(f"{weight}{_WHOLE} says that {weight} is quantised in a way that is not supported")
    has_zeros = weight + _ZEROS in headers
    if not scheme.symmetric and not has_zeros:
        raise CheckpointError(
            f"quantization_config says that {weight} has zero points, and the checkpoint has no {weight}{_ZEROS}: "
            "download it again"
        )
    return CompressedWeight(weight, scheme, has_zeros)


def packed_layout(shape: tuple[int, int], scheme: WeightScheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part of a packed weight [O, D]."""
    rows, columns = shape
    words = -(-columns * scheme.format.bits // 32)
    groups = -(-columns // scheme.group) if scheme.group else 1
    return {
        PACKED: (torch.int32, (rows, words)),
        SCALE: (torch.bfloat16, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The parts of a quantised weight [O, D], as `packed_layout` says."""
    bits, codes = weight.format.bits, weight.codes.view(torch.uint8)
    unsigned = codes ^ 0x80 if bits == 8 else (codes & 15) ^ 8
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % (_BYTES_A_WORD * per_byte)))
    if per_byte == 2:  # two neighbours, seen as one little-endian number
        pairs = padded.view(torch.int16)
        padded = ((pairs | (pairs >> 4)) & 0xFF).to(torch.uint8)
    return {
        PACKED: padded.contiguous().view(torch.int32),
        SCALE: weight.scales.contiguous(),
        SHAPE: torch.tensor(weight.codes.shape),
    }


def unpack(name: str, parts: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
    """The quantised weight that parts stand for.

    Args:
        name: of the weight, for errors.
        parts: as `pack` makes them, or another tool; int4 scales of whole rows are repeated for groups of 128.
        scheme: what the checkpoint's config says of it.

    Raises:
        CheckpointError: the parts do not fit together, or scales are not finite.
    """
    shape = tuple(int(n) for n in parts[SHAPE].flatten().tolist())
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{name}{SHAPE} is {list(shape)}: only matrices are supported")
    expected = packed_layout((shape[0], shape[1]), scheme)
    for part in (PACKED, SCALE):
        found = tuple(parts[part].shape)
        if found != expected[part][1]:
            raise CheckpointError(
                f"{name}{part} has shape {list(found)} and should have {list(expected[part][1])}: "
                "the checkpoint is damaged, or its config.json belongs to another"
            )
    if parts[PACKED].dtype != torch.int32:
        raise CheckpointError(f"{name}{PACKED} is stored as {parts[PACKED].dtype}: it must be int32")
    scales = _exact_scales(f"{name}{SCALE}", parts[SCALE])
    codes = _unpack_codes(parts[PACKED], scheme.format.bits)[:, : shape[1]].contiguous()
    if scheme.group is None and scheme.format.bits == 4:
        scales = scales.expand(-1, -(-shape[1] // _CHANNEL_GROUP_INT4)).contiguous()
        return QuantizedWeight(codes, scales, scheme.format, _CHANNEL_GROUP_INT4)
    return QuantizedWeight(codes, scales, scheme.format, scheme.group or shape[1])


def _unpack_with_zeros(name: str, parts: Mapping[str, Tensor], scheme: WeightScheme) -> QuantizedWeight:
    """A weight with zero points, scale * (code - zero); both are made unsigned alike."""
    plain = unpack(
        name, {part: parts[part] for part in (PACKED, SHAPE)} | {SCALE: torch.ones_like(parts[SCALE])}, scheme
    )
    outputs, groups = parts[SCALE].shape
    zeros, per_word = parts[_ZEROS], 32 // scheme.format.bits
    if tuple(zeros.shape) != (-(-outputs // per_word), groups) or zeros.dtype != torch.int32:
        raise CheckpointError(
            f"{name}{_ZEROS} is {zeros.dtype} {list(zeros.shape)} and should be int32 "
            f"{[-(-outputs // per_word), groups]}: the checkpoint is damaged, or of a version that is not known"
        )
    middle = 1 << scheme.format.bits - 1
    unsigned = _unpack_codes(zeros.T.contiguous(), scheme.format.bits)[:, :outputs].T.short() + middle
    group = scheme.group or plain.codes.shape[1]
    return affine(name, plain.codes.short() + middle, unsigned, parts[SCALE], scheme.format.bits, group)


def _unpack_codes(packed: Tensor, bits: int) -> Tensor:
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (unsigned ^ 0x80).view(torch.int8)
    pairs = unsigned.to(torch.int16)
    pairs = (pairs | (pairs << 4)) & 0x0F0F
    return pairs.view(torch.int8) - 8


def _exact_scales(name: str, scales: Tensor) -> Tensor:
    """Scales in the narrowest type of those that kernels take in which they are the same."""
    if not scales.is_floating_point() or not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{name} holds NaN or infinite values, or no floating point: the checkpoint is damaged")
    for dtype in (torch.bfloat16, torch.float16):
        exact = scales.to(dtype)
        if torch.equal(exact.to(scales.dtype), scales):
            return exact
    return scales.float()
