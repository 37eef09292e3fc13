"""Plain rounding to any format that weights are kept in: each weight to the nearest number of its group's.

What a model's weights are rounded to is searched for with more care: `weight.quantize_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.weights.formats import CodeFormat
from latentkv.weights.weight import QuantizedWeight


def round_plainly(
    weight: Tensor, form: CodeFormat, group: int, scales_dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """A weight [..., O, D], any float dtype, in a format: a group's largest weight is its largest number.

    Args:
        weight: finite.
        form: what to round to.
        group: inputs that share a scale.
        scales_dtype: of scales and minima: bfloat16, float16 or float32.
    """
    columns = weight.shape[-1]
    grouped = functional.pad(weight.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    codes = torch.arange(form.lowest, form.highest + 1, dtype=torch.int16).to(torch.int8)
    codes = codes[~form.values(codes).isnan()]  # not all of a float8's codes are numbers
    numbers, order = form.values(codes).sort()
    minima = None
    if form.has_minima:
        minima = grouped.amin(-1).to(scales_dtype)
        widest = (grouped.amax(-1) - minima.float()) / numbers[-1]
    else:
        widest = grouped.abs().amax(-1) / min(-numbers[0], numbers[-1])
    scales = widest.to(scales_dtype)
    shifted = grouped if minima is None else grouped - minima.float()[..., None]
    wanted = shifted / scales.float()[..., None].clamp(min=torch.finfo(torch.float32).tiny)
    middles = (numbers[1:] + numbers[:-1]) / 2
    found = codes[order][torch.bucketize(wanted.contiguous(), middles)]
    return QuantizedWeight(found.flatten(-2)[..., :columns].contiguous(), scales, form, group, minima)
