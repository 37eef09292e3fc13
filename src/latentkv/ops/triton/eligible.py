"""Whether Triton's kernels may take a call: what they cannot do, torch computes."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

from latentkv.kernels import ENVIRONMENT_VARIABLE, has_triton, named_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
"""Ampere, the first with bf16 products."""
INTERPRETER_VARIABLE = "TRITON_INTERPRET"


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton's kernels do not compute on `device`, to follow "Triton's kernels"; None where they do."""
    named = named_backend()
    if device.type == "cuda":
        if named == "torch":
            return f"are switched off: unset {ENVIRONMENT_VARIABLE}"
        return _why_not_on_gpu(device)
    if device.type != "cpu" or named != "triton":
        return f"run on a GPU, and on a CPU only for tests, where {ENVIRONMENT_VARIABLE}=triton names them"
    if os.environ.get(INTERPRETER_VARIABLE) != "1":
        return f"run on a CPU through their interpreter only: set {INTERPRETER_VARIABLE}=1 before Python starts"
    return None


def takes(*tensors: Tensor) -> bool:
    """Whether Triton's kernels compute on these tensors.

    Torch computes gradients, under autocast, other element types and tensors that are more than memory (DTensor).
    """
    device = tensors[0].device
    if torch.is_autocast_enabled(device.type):
        return False
    differentiates = torch.is_grad_enabled()
    for t in tensors:
        if (
            t.dtype not in DTYPES
            or t.device != device
            or (differentiates and t.requires_grad)
            or (type(t) is not Tensor and type(t) is not Parameter)
        ):
            return False
    return why_not_triton(device) is None


@cache
def _why_not_on_gpu(device: torch.device) -> str | None:
    if not has_triton():
        return "need the package triton: pip install 'latentkv[gpu]'"
    if torch.version.hip is None and (have := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return f"need compute capability {_dotted(OLDEST_CAPABILITY)}, not this GPU's {_dotted(have)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
