"""Weights in every format that is packed, for the tests of what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.formats import CODE_FORMATS, ROUNDED_TO
from latentkv.weights.rounding import round_plainly
from latentkv.weights.weight import QuantizedWeight, quantize_weight

SCALES = {"": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def quantised(weight: Tensor, fmt: str, group: int | None) -> QuantizedWeight:
    """A float weight in a format of `CODE_FORMATS`.

    "int8 f16" has scales in float16, "uint4 f32" scales and minima in float32.
    """
    name, _, scales = fmt.partition(" ")
    if name in ROUNDED_TO:
        found = quantize_weight(weight, name, group)
        return QuantizedWeight(found.codes, found.scales.to(SCALES[scales]), found.format, found.group)
    return round_plainly(weight, CODE_FORMATS[name], group or weight.shape[-1], SCALES[scales])
