"""Which implementation serves which op, device and dtype. `latentkv doctor` prints it."""

from __future__ import annotations

from typing import Literal

import torch

from latentkv.ops.native import core

FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefill_backend(device: torch.device, dtype: torch.dtype) -> Literal["native", "flash", "blocks"]:
    """What computes `mla_prefill` where no gradient is wanted.

    Native kernels: three times as fast as torch's flash attention in bf16 and up to twice in float32, at 512 to 4096
    tokens. Without them, flash attention where it returns the log-sum-exp too, else our own loop over blocks.
    """
    if device.type != "cpu" or dtype not in FLASH_DTYPES:
        return "blocks"
    return "flash" if why_not_native(device) else "native"


def why_not_native(device: torch.device) -> str | None:
    """Why the native kernels do not compute on `device`, to follow "the native kernels"; None where they do."""
    if device.type != "cpu":
        return f"run on a CPU only, not on {device}"
    if core.extension is None:
        return f"were not built ({core.why_no_extension()}): install a C++ compiler, then LatentKV anew"
    if core.current_isa() == "torch":
        return f"are switched off: unset {core.ENVIRONMENT_VARIABLE}"
    return None


def describe_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """One line an op: what computes it on this device and why."""
    blocks = f"torch, blocks of rows over chunks of keys in {'float64' if dtype == torch.float64 else 'float32'}"
    attend = blocks if why_not_native(device) or dtype not in core.DTYPE_CODES else _native_attention(dtype)
    prefill = {
        "native": _native_attention(dtype),
        "flash": "torch's flash attention for CPUs in float32, which returns the log-sum-exp",
        "blocks": f"{blocks}: flash attention takes float32, bf16 and fp16 on a CPU",
    }
    return {
        "mla_attend": attend,
        "gqa_attend": attend,
        "mla_prefill": prefill[prefill_backend(device, dtype)],
        "moe_experts": "torch, one matrix product per expert in use",
        "linear": "torch",
        "rms_norm": "torch",
        "apply_rope": "torch",
    }


def _native_attention(dtype: torch.dtype) -> str:
    """The kernels' instruction set and what they multiply."""
    isa = core.current_isa()
    numbers = "bf16" if dtype == torch.bfloat16 and isa == "avx512bf16" else "float32"
    return f"native kernels for {isa}: {numbers} products, float32 sums"
