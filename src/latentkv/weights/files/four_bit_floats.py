"""Weights as E2M1, floating point of 4 bits, two to a byte (the first lower): NVFP4 and MXFP4.

NVFP4 has a scale in E4M3 for 16 weights, and one in float32 for all: compressed-tensors divides by it
(`NAME.weight_global_scale`), ModelOpt multiplies with it (`NAME.weight_scale_2`). MXFP4 has an exponent for 32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.files.scaled_codes import kept_scales, require_finite
from latentkv.weights.files.stored_weight import Read, ShapeOf, require_shapes
from latentkv.weights.formats import FP4
from latentkv.weights.weight import QuantizedWeight

NVFP4_GROUP, MXFP4_GROUP = 16, 32


@dataclass(frozen=True)
class FourBitFloats:
    """See `StoredWeight`.

    Attributes:
        codes: name of the tensor of bytes [O, D / 2].
        scale: name of the scales [O, D / 16 or 32].
        whole: name of the one for all weights; None: there is none (MXFP4).
        divides: scales are divided by it.
        others: further parts that belong to the weight and are not needed.
    """

    codes: str
    scale: str
    whole: str | None = None
    divides: bool = False
    others: tuple[str, ...] = ()
    rounded: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight`."""
        return (self.codes, self.scale, *([self.whole] if self.whole else []), *self.others)

    @property
    def shown(self) -> str:
        """See `StoredWeight`."""
        return "NVFP4" if self.whole else "MXFP4"

    @property
    def _group(self) -> int:
        return NVFP4_GROUP if self.whole else MXFP4_GROUP

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """See `StoredWeight`."""
        codes, scales = shape_of(self.codes), shape_of(self.scale)
        if len(codes) != 2 or 0 in codes:
            raise CheckpointError(f"{self.codes} has the shape {list(codes)}: only matrices are supported")
        shape = codes[0], 2 * codes[1]
        require_shapes({self.scale: scales}, {self.scale: (shape[0], -(-shape[1] // self._group))})
        return shape

    def unpack(self, read: Read) -> QuantizedWeight:
        """See `StoredWeight`."""
        packed, scales = read(self.codes), read(self.scale)
        self.shape(lambda part: tuple((packed if part == self.codes else scales).shape), read)
        if packed.dtype != torch.uint8:
            raise CheckpointError(f"{self.codes} is stored as {packed.dtype}: it must be uint8, two codes to a byte")
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).view(torch.int8)
        shared = (
            self._e4m3_scales(scales, read(self.whole)) if self.whole else kept_scales(self.codes, self.scale, scales)
        )
        return QuantizedWeight(codes, shared / 2, FP4, self._group)  # of which the codes stand for twice E2M1's numbers

    def _e4m3_scales(self, scales: Tensor, whole: Tensor) -> Tensor:
        if scales.dtype != torch.float8_e4m3fn or whole.numel() != 1 or not whole.is_floating_point():
            raise CheckpointError(
                f"{self.scale} is {scales.dtype} and {self.whole} {whole.dtype} {list(whole.shape)}: NVFP4 has scales "
                "as float8_e4m3fn, and one float32 for all weights"
            )
        one = whole.float().flatten()
        shared = scales.float() / one if self.divides else scales.float() * one
        require_finite(self.codes, shared)
        return shared
