"""Which implementation serves which op, device and dtype. `latentkv doctor` prints it."""

from __future__ import annotations

from typing import Literal

import torch

from latentkv import kernels
from latentkv.ops.triton import eligible as triton
from latentkv.ops.triton.eligible import why_not_triton
from latentkv.weights.formats import KERNEL_NUMBERS

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
    if kernels.extension is None:
        return f"were not built ({kernels.why_no_extension()}): install a C++ compiler, then LatentKV anew"
    if kernels.native_isa() is None:
        return f"are switched off: unset {kernels.ENVIRONMENT_VARIABLE}"
    return None


def why_no_int8_products(device: torch.device) -> str | None:
    """Why attention over int8 pages cannot be computed in int8 products there, as a clause; None where it can."""
    if (reason := why_not_native(device)) is not None:
        return f"the native kernels {reason}"
    if not kernels.has_int8_products():
        return f"the kernels for {kernels.current_backend()} have none, those for AVX-512 VNNI do"
    return None


def compact_is_fast() -> bool:
    """Whether compact weights are worth it here: measured on these instruction sets only, where they were."""
    return kernels.current_backend() in kernels.BF16_BACKENDS


def describe_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """One line an op: what computes it on this device (`why_not_native`, `why_not_triton`: why that is torch)."""
    if why_not_triton(device) is None and dtype in triton.DTYPES:
        return _triton_backends(device, dtype)
    if why_not_native(device) is not None or dtype not in kernels.DTYPE_CODES:
        return _torch_backends(device, dtype)
    backend = kernels.current_backend()
    native = f"native, {backend}"
    by_dtype = (
        f"{native}, {'bf16' if backend in kernels.BF16_BACKENDS and dtype == torch.bfloat16 else 'float32'} products"
    )
    return {
        "mla_attend": by_dtype,
        "gqa_attend": by_dtype,
        "mla_prefill": by_dtype,
        "mla_attend, int8 products": why_no_int8_products(device) or f"{native}, where they are asked for",
        "linear": "torch: the weight is not packed",
        "moe_experts": "torch, one matrix product per expert in use: the weights are not packed",
        **{f"linear, packed {fmt}": native for fmt in KERNEL_NUMBERS},
        "moe_experts, packed": native,
        "headwise_linear": native,
        "rms_norm": native,
        "apply_rope": native,
        "norm_rope_write": native,
        "kda_attend": f"{native}, in float32",
        "lightning_attend": f"{native}, in float32",
        "gate_heads": native,
        "select_experts": "native",
        "write_index_keys": native,
        "write_pooled_keys": native,
        "mix_streams": native,
        "expand_streams": native,
        "select_slots": by_dtype,
        "latents as fp8": f"{native}; torch reads them back",
        "latents as int8": f"{native}; torch reads them back",
        "merge_states": "torch",
    }


def _triton_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    by = "Triton" if device.type == "cuda" else "Triton's interpreter"
    attention = f"{by}, {str(dtype).removeprefix('torch.')} products"
    return {
        **_torch_backends(device, dtype),
        "mla_attend": f"{attention}, split into chunks of tokens",
        "gqa_attend": f"{attention}, split into chunks of tokens",
        "mla_prefill": attention,
        "moe_experts": f"{by}, all experts in two products",
        "rms_norm": by,
        "apply_rope": by,
        "norm_rope_write": by,
        "latents as fp8": f"{by}; torch reads them back",
        "latents as int8": f"{by}; torch reads them back",
        "merge_states": by,
    }


def _torch_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    blocks = f"torch, blocks of rows over chunks of keys in {'float64' if dtype == torch.float64 else 'float32'}"
    flash = "torch's flash attention for CPUs in float32, which returns the log-sum-exp"
    return {
        "mla_attend": blocks,
        "gqa_attend": blocks,
        "mla_prefill": flash if prefill_backend(device, dtype) == "flash" else blocks,
        "linear": "torch",
        "moe_experts": "torch, one matrix product per expert in use",
        "rms_norm": "torch",
        "apply_rope": "torch",
        "norm_rope_write": "torch",
        "write_index_keys": "torch",
        "write_pooled_keys": "torch",
        "mix_streams": "torch",
        "expand_streams": "torch",
        "select_slots": "torch, a row at a time",
        "merge_states": "torch",
    }
