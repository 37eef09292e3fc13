"""fp8: weights as E4M3, floating point of 8 bits (OCP 8-bit floating point, section 3), the bytes as they are."""

import torch

from latentkv.weights.formats.code_format import CodeFormat


def _levels() -> tuple[float, ...]:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    return tuple(codes.view(torch.float8_e4m3fn).float().tolist())


FP8 = CodeFormat("fp8", kernel=11, bits=8, lowest=-128, levels=_levels())
"""Two of the codes are NaN: no weight may have them."""
