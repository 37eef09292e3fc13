"""What torch itself offers for products with weights of 8 and 4 bits on a CPU: what torchao's formats end up in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentkv.weights import QuantizedWeight
from latentkv.weights.formats import INT4, INT8

Product = Callable[[Tensor], Tensor]

_LANES = 64  # outputs that torch packs together


def torch_products(weight: QuantizedWeight, copies: int) -> list[Product] | None:
    """Torch's product of bf16 rows [M, D] with copies of a matrix [O, D], each in memory of its own.

    Returns:
        None where torch has none: 8 bits whose scales are shared by less than a row, or sizes that it does not pack.
    """
    outs, ins = weight.codes.shape
    if weight.format == INT8 and weight.group == ins:
        scale = weight.scales[:, 0].contiguous()
        return [_int8_product(weight.codes.clone(), scale) for _ in range(copies)]
    if weight.format == INT4 and outs % _LANES == 0 and ins % weight.group == 0:
        unsigned = weight.codes.int() + 8
        scales = torch.stack([weight.scales.mT, torch.zeros_like(weight.scales.mT)], dim=-1)  # and what a code 8 means
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return [_int4_product(pack(unsigned, 1), scales, weight.group) for _ in range(copies)]
    return None


def _int8_product(codes: Tensor, scale: Tensor) -> Product:
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def _int4_product(packed: Tensor, scales: Tensor, group: int) -> Product:
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)
