"""The dtypes of safetensors files, in one table: what reading, inspecting and sizing know of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StoredDtype:
    """How a file stores numbers.

    Attributes:
        name: what safetensors calls it.
        bits: of one number.
        torch: the same in torch; None where torch has no dtype with one element for each number.
        shown: its name for people.
    """

    name: str
    bits: int
    torch: torch.dtype | None

    @property
    def shown(self) -> str:
        """Torch's name, or where it has none safetensors'."""
        return self.name if self.torch is None else short_name(self.torch)

    @property
    def is_float8(self) -> bool:
        """Whether it holds float8 values, which mean something only beside a scale."""
        return self.torch in _FLOAT8

    @property
    def is_float(self) -> bool:
        """Whether its numbers are weights as they are."""
        return self.torch in _FLOATS

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor in its file."""
        return -(-math.prod(shape) * self.bits // 8)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

STORED: Mapping[str, StoredDtype] = {
    name: StoredDtype(name, bits, dtype)
    for name, bits, dtype in (
        ("F64", 64, torch.float64),
        ("F32", 32, torch.float32),
        ("F16", 16, torch.float16),
        ("BF16", 16, torch.bfloat16),
        ("F8_E4M3", 8, torch.float8_e4m3fn),
        ("F8_E5M2", 8, torch.float8_e5m2),
        ("F8_E4M3FNUZ", 8, torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", 8, torch.float8_e5m2fnuz),
        ("F8_E8M0", 8, torch.float8_e8m0fnu),
        ("F6_E2M3", 6, None),
        ("F6_E3M2", 6, None),
        ("F4", 4, None),  # torch has pairs of them only
        ("C64", 64, torch.complex64),
        ("I64", 64, torch.int64),
        ("I32", 32, torch.int32),
        ("I16", 16, torch.int16),
        ("I8", 8, torch.int8),
        ("U64", 64, torch.uint64),
        ("U32", 32, torch.uint32),
        ("U16", 16, torch.uint16),
        ("U8", 8, torch.uint8),
        ("BOOL", 8, torch.bool),
    )
}
"""Every dtype that a file may name, by that name."""

NAMES: Mapping[torch.dtype, str] = {dtype.torch: name for name, dtype in STORED.items() if dtype.torch is not None}
"""What a file calls a dtype of torch."""


def short_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
