"""Whether the kernels may take a call: what they cannot do, torch computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from latentkv.kernels import DTYPE_CODES, native_isa


def isa_for(*tensors: Tensor) -> Any | None:
    """The instruction set for a call on these tensors; None where torch is to compute it.

    Torch computes gradients, other devices, other element types and tensors that are more than memory (DTensor).
    """
    isa = native_isa()
    if isa is None:
        return None
    differentiates = torch.is_grad_enabled()
    for t in tensors:
        if (
            t.dtype not in DTYPE_CODES
            or not t.is_cpu
            or (differentiates and t.requires_grad)
            or (type(t) is not Tensor and type(t) is not Parameter)
        ):
            return None
    return isa
