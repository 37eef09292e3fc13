"""Weights as integers of every kind that is packed, for the tests of what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.weight import QuantizedWeight, quantize_weight

UNSIGNED = ("uint2", "uint4", "uint5", "uint6")


def quantised(weight: Tensor, fmt: str, group: int | None) -> QuantizedWeight:
    """A float weight as "int8", "int4", one of these with float16 scales ("int8 f16"), or with minima ("uint5")."""
    name, _, scales = fmt.partition(" ")
    if name not in UNSIGNED:
        found = quantize_weight(weight, "int8" if name == "int8" else "int4", group)
        dtype = torch.float16 if scales else torch.bfloat16
        return QuantizedWeight(found.codes, found.scales.to(dtype), found.bits, found.group)
    assert group is not None
    bits, columns = int(name[-1]), weight.shape[-1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    minima = padded.amin(-1).half()
    scales_ = ((padded.amax(-1) - minima.float()) / (2**bits - 1)).half()
    codes = ((padded - minima.float()[..., None]) / scales_.float()[..., None].clamp(min=1e-6)).round()
    codes = codes.clamp(0, 2**bits - 1).to(torch.int8).flatten(-2)[..., :columns].contiguous()
    return QuantizedWeight(codes, scales_, bits, group, minima)
