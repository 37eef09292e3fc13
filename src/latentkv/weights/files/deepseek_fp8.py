"""DeepSeek's float8 weights: e4m3 values with one scale per block (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.files.dtypes import STORED, StoredDtype
from latentkv.weights.files.scaled_codes import Blocks, ScaledCodes
from latentkv.weights.files.stored_weight import Headers

SCALE_SUFFIXES = ("_scale_inv", "_activation_scale", ".activation_scale")
"""What scales are called beside their weight. Activation scales serve float8 arithmetic and are not needed here."""

_SCALE, _KEPT = "_scale_inv", "F8_E4M3"

BlockSize = tuple[int, int] | None
"""Rows and columns that share a scale; None: the whole matrix shares one."""

# Exponents without sign and mantissa: 2^(byte - 127), and 255 is NaN (OCP microscaling formats, section 5.4.1).
_EXPONENTS = "ue8m0"
_SCALE_FORMATS = (None, _EXPONENTS, "float", "float32", "fp32")


@dataclass(frozen=True)
class Float8Scheme:
    """How a checkpoint's float8 weights are scaled.

    Attributes:
        block_size: that shares a scale.
        scale_fmt: "ue8m0" says that scales are powers of two, and that bytes are their exponents.
    """

    block_size: BlockSize = (128, 128)
    scale_fmt: str | None = None

    def why_no_scale(self, name: str, stored: StoredDtype) -> str | None:
        """Why a tensor cannot be a scale as it is stored; None where it can."""
        if stored.is_float or stored.torch == torch.float8_e8m0fnu:
            return None
        if stored.torch == torch.uint8 and self.scale_fmt == _EXPONENTS:
            return None
        unsaid = ": as bytes it needs quantization_config.scale_fmt 'ue8m0'" if stored.torch == torch.uint8 else ""
        return f"scale {name} is stored as {stored.shown}, which is not supported{unsaid or ': store it as float32'}"

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight: one a block, where blocks at the lower and right edge may be partial."""
        *leading, rows, columns = shape if len(shape) >= 2 else (1, *shape)
        block_rows, block_columns = self.block_size or (rows, columns)
        return (*leading, -(-rows // max(block_rows, 1)), -(-columns // max(block_columns, 1)))

    def fits(self, shape: Sequence[int], scales: Sequence[int]) -> bool:
        """Whether scales of that shape are one for each block of a weight; axes of length 1 may be left out."""
        return [n for n in scales if n != 1] == [n for n in self.grid(shape) if n != 1]

    def dequantize(self, weight: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply every block of `weight` by its scale, in float32.

        Args:
            weight: [..., rows, columns] float8.
            scale_inv: one scale a block, as `fits` says: float, or exponents (ue8m0) as float8_e8m0fnu or uint8.
            dtype: of the result.

        Returns:
            [..., rows, columns] in `dtype`.

        Raises:
            ValueError: the number of scales does not match the shape of the weight.
        """
        *leading, rows, columns = weight.shape if weight.dim() >= 2 else (1, *weight.shape)
        grid = self.grid(weight.shape)
        if not self.fits(weight.shape, scale_inv.shape):
            raise ValueError(
                f"expected scales of shape {grid} for blocks of {self.block_size}, found {tuple(scale_inv.shape)}"
            )
        block_rows, block_columns = self.block_size or (rows, columns)
        scale = _as_float(scale_inv).reshape(grid)
        result = torch.empty(weight.shape, dtype=dtype)
        source, target = weight.reshape(*leading, rows, columns), result.view(*leading, rows, columns)
        for index in range(grid[-2]):  # a row of blocks at a time, so that no float32 copy of the whole weight exists
            block = slice(index * block_rows, (index + 1) * block_rows)
            columns_scale = scale[..., index : index + 1, :].repeat_interleave(block_columns, dim=-1)[..., :columns]
            target[..., block, :] = source[..., block, :].to(torch.float32) * columns_scale
        return result


def find_float8(headers: Headers, scheme: Float8Scheme) -> dict[str, ScaledCodes]:
    """The weights among a checkpoint's float8 tensors that can be kept in 8 bits, by name.

    Others are those without scales that fit, of another kind of float8, or whose blocks are too narrow for kernels.
    """
    found: dict[str, ScaledCodes] = {}
    for name, (shape, dtype) in headers.items():
        scale = headers.get(f"{name}{_SCALE}")
        if dtype != _KEPT or scale is None or len(shape) < 2 or 0 in shape:
            continue
        rows, columns = scheme.block_size or (None, None)
        whole = columns is None or columns % 8 == 0 or columns >= shape[-1]
        if whole and scheme.fits(shape, scale[0]) and scheme.why_no_scale(f"{name}{_SCALE}", STORED[scale[1]]) is None:
            blocks = Blocks(rows, columns)
            found[name] = ScaledCodes(name, f"{name}{_SCALE}", blocks, STORED[dtype].shown)
    return found


def read_float8_scheme(quantization: Mapping[str, Any] | None) -> Float8Scheme:
    """The scheme from a config's `quantization_config` (blocks of 128 x 128 where it says nothing).

    Raises:
        CheckpointError: it holds a value that is not supported.
    """
    if not quantization:
        return Float8Scheme()
    scale_fmt = quantization.get("scale_fmt")
    if scale_fmt not in _SCALE_FORMATS:
        raise CheckpointError(
            f"quantization_config.scale_fmt is {scale_fmt!r}, which is not supported: {_EXPONENTS!r} and 'float' are"
        )
    size = quantization.get("weight_block_size", (128, 128))
    if size is None:
        return Float8Scheme(None, scale_fmt)
    try:
        rows, columns = (int(n) for n in size)
    except (TypeError, ValueError, OverflowError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise CheckpointError(f"quantization_config.weight_block_size is {size!r}: it must be two positive numbers")
    return Float8Scheme((rows, columns), scale_fmt)


def _as_float(scale: Tensor) -> Tensor:
    """Scales in float32, exponents decoded."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
