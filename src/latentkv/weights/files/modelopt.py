"""Weights as NVIDIA's ModelOpt exports them: float8 with scales for a tensor, outputs or blocks, MXFP8, and NVFP4.

`NAME.weight` is float8, or bytes with two E2M1 codes; `NAME.weight_scale` its scales, and `NAME.weight_scale_2` the one
that all of NVFP4's have in common. What else lies beside them serves arithmetic in low precision, and is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentkv.errors import CheckpointError
from latentkv.weights.files.four_bit_floats import FourBitFloats
from latentkv.weights.files.scaled_codes import CHANNEL, TENSOR, Blocks, ScaledCodes
from latentkv.weights.files.stored_weight import Headers, StoredWeight, activation_parts

METHOD = "modelopt"
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4")
"""Those of `quant_algo` that are read; what a weight is, its parts say."""

_SCALE, _WHOLE = "_scale", "_scale_2"
_PRE_QUANT = ".pre_quant_scale"  # of inputs, by which weights were divided


def algorithm_of(config: Mapping[str, Any]) -> str | None:
    """`quant_algo` of a `quantization_config`, or of what hf_quant_config.json holds, in capitals."""
    inner = config.get("quantization")
    found = config.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
    return found.upper() if isinstance(found, str) else None


def find_modelopt(headers: Headers, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Every quantised weight of a checkpoint, by its name.

    Raises:
        CheckpointError: it has parts that are not supported.
    """
    found: dict[str, StoredWeight] = {}
    for scale in headers:
        name = scale.removesuffix(_SCALE)
        if not scale.endswith(f".weight{_SCALE}") or name not in headers:
            continue
        module = name.removesuffix(".weight")
        if module + _PRE_QUANT in headers:
            raise CheckpointError(
                f"{module}{_PRE_QUANT} says that the inputs of {module} are scaled, too, which is not supported: use "
                "the original weights"
            )
        others = activation_parts(headers, module)
        if headers[name][1] == "U8":
            if name + _WHOLE not in headers:
                raise CheckpointError(f"NVFP4 weight {name} has no {name}{_WHOLE} beside it: download it again")
            found[name] = FourBitFloats(name, scale, name + _WHOLE, others=others)
        elif headers[name][1].startswith("F8"):
            found[name] = ScaledCodes(name, scale, _blocks(headers, name, scale), "float8_e4m3fn", others=others)
    return found


def _blocks(headers: Headers, name: str, scale: str) -> Blocks:
    """What shares a scale, by the scales' shape and dtype."""
    shape, (scales, dtype) = headers[name][0], headers[scale]
    if dtype in ("U8", "F8_E8M0"):
        return Blocks(1, 32)
    known = (TENSOR, CHANNEL) if len(shape) > 1 else ()
    return next((blocks for blocks in known if blocks.fits(shape, scales)), Blocks(128, 128))
