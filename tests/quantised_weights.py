"""Weights as integers of every kind that is packed, for the tests of what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.weight import QuantizedWeight, quantize_weight

SCALES = {"": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def quantised(weight: Tensor, fmt: str, group: int | None) -> QuantizedWeight:
    """A float weight as "int8", "int4", "int5", "int6", or with minima, "uint2", "uint4", "uint5".

    "int8 f16" has scales in float16, "uint4 f32" scales and minima in float32.
    """
    name, _, scales = fmt.partition(" ")
    bits, columns, dtype = int(name[-1]), weight.shape[-1], SCALES[scales]
    if name in ("int8", "int4"):
        found = quantize_weight(weight, "int8" if name == "int8" else "int4", group)
        return QuantizedWeight(found.codes, found.scales.to(dtype), found.bits, found.group)
    assert group is not None
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    signed, least = not name.startswith("u"), 0 if name.startswith("u") else -(2 ** (bits - 1))
    minima = torch.zeros_like(padded[..., 0]) if signed else padded.amin(-1).to(dtype).float()
    widest = padded.abs().amax(-1) / (-least or 1) if signed else (padded.amax(-1) - minima) / (2**bits - 1)
    steps = widest.to(dtype)
    codes = ((padded - minima[..., None]) / steps.float()[..., None].clamp(min=1e-6)).round()
    codes = codes.clamp(least, least + 2**bits - 1).to(torch.int8).flatten(-2)[..., :columns].contiguous()
    return QuantizedWeight(codes, steps, bits, group, None if signed else minima.to(dtype))
