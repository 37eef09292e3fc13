"""Weights whose codes of 8 bits are a tensor of the weight's own shape and name, with their scales in another one.

Float8 (E4M3) as DeepSeek, compressed-tensors ("float-quantized", "mxfp8-quantized") and ModelOpt store it, and integers
of compressed-tensors' "int-quantized".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.files.stored_weight import Read, ShapeOf
from latentkv.weights.formats import FP8, INT8
from latentkv.weights.weight import QuantizedWeight

_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_FORMATS = {torch.int8: INT8, torch.float8_e4m3fn: FP8}
_NAN = 0x7F  # of E4M3, either sign


@dataclass(frozen=True)
class Blocks:
    """What shares a scale.

    Attributes:
        rows: outputs of a block; None: all.
        columns: inputs of a block; None: all.
    """

    rows: int | None
    columns: int | None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight [..., O, D]: blocks at the lower and right edge may be partial."""
        *leading, rows, columns = shape
        return (*leading, -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns)))

    def fits(self, shape: Sequence[int], scales: Sequence[int]) -> bool:
        """Whether scales of that shape are one for each block of a weight; axes of length 1 may be left out."""
        return [n for n in scales if n != 1] == [n for n in self.grid(shape) if n != 1]

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """The scales [..., O, groups] of each output of a weight [..., O, D]."""
        rows = shape[-2]
        return scales.reshape(self.grid(shape)).repeat_interleave(self.rows or rows, dim=-2)[..., :rows, :].contiguous()


CHANNEL, TENSOR = Blocks(1, None), Blocks(None, None)


@dataclass(frozen=True)
class ScaledCodes:
    """See `StoredWeight`.

    Attributes:
        name: of the weight, and of its codes.
        scale: name of its scales.
        blocks: what shares one.
        shown: how it is stored, for people.
        zeros: name of its zero points, where there are some; they must be 0.
        others: further parts that belong to it and are not needed.
    """

    name: str
    scale: str
    blocks: Blocks
    shown: str
    zeros: str | None = None
    others: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight`."""
        return (self.name, self.scale, *([self.zeros] if self.zeros else []), *self.others)

    @property
    def rounded(self) -> bool:
        """See `StoredWeight`: models are published in float8."""
        return self.shown == "int8"

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """See `StoredWeight`."""
        shape, scales = shape_of(self.name), shape_of(self.scale)
        if len(shape) < 2 or 0 in shape:
            raise CheckpointError(f"{self.name} has the shape {list(shape)}: only matrices are supported")
        if not self.blocks.fits(shape, scales):
            raise CheckpointError(
                f"scale {self.scale} of shape {list(scales)} does not fit {self.name}, which needs "
                f"{list(self.blocks.grid(shape))}"
            )
        return shape

    def unpack(self, read: Read) -> QuantizedWeight:
        """See `StoredWeight`."""
        stored, scales = read(self.name), kept_scales(self.name, self.scale, read(self.scale))
        if stored.dtype not in _FORMATS:
            raise CheckpointError(f"{self.name} is stored as {stored.dtype}: it must be float8_e4m3fn or int8")
        shape = self.shape(lambda part: tuple((stored if part == self.name else scales).shape), read)
        if self.zeros and bool(read(self.zeros).float().any()):
            raise CheckpointError(
                f"{self.name} is quantised to 8 bits with zero points, which is not supported: quantise the original "
                "weights with `latentkv quantize`"
            )
        form, codes = _FORMATS[stored.dtype], stored.view(torch.int8)
        if form is FP8 and bool(((codes & _NAN) == _NAN).any()):
            raise CheckpointError(
                f"tensor {self.name} holds NaN or infinite values as float8: the checkpoint is damaged, or its values "
                "need a wider dtype"
            )
        group = min(self.blocks.columns or shape[-1], shape[-1])
        return QuantizedWeight(codes.contiguous(), self.blocks.spread(scales, shape), form, group)


def kept_scales(weight: str, name: str, scales: Tensor) -> Tensor:
    """Scales as they are kept beside codes: those that are exponents (2^(e - 127)) as bfloat16, which has them all.

    Args:
        weight: name of the weight, for errors.
        name: theirs.
        scales: as they are stored.

    Raises:
        CheckpointError: they are NaN or infinite, or of another dtype.
    """
    if scales.dtype in _EXPONENTS:
        scales = scales.view(torch.float8_e8m0fnu).float().bfloat16()
    elif scales.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise CheckpointError(f"scale {name} is stored as {scales.dtype}, which is not supported: store it as float32")
    require_finite(weight, scales)
    return scales


def require_finite(weight: str, scales: Tensor) -> None:
    """Raise `CheckpointError` unless the scales of a weight are numbers."""
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"tensor {weight} holds NaN or infinite values in its scales: the checkpoint is damaged")
