"""Names of dtypes: ours, and those that torch, vLLM and Hugging Face use for the same."""

from __future__ import annotations

from typing import cast

_OURS = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp8_e4m3": "fp8",
}


def short_dtype(name: str) -> str:
    """Our name of a dtype; what is none stays as it is, for whoever refuses it."""
    return _OURS.get(name.removeprefix("torch."), name) if isinstance(cast(object, name), str) else name
