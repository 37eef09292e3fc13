"""How a checkpoint says that its weights are quantised: in config.json, or in a file that the tool put beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentkv.checkpoint.locate import read_object
from latentkv.checkpoint.wrapper import outermost
from latentkv.weights.files import awq, compressed_config, gptq, modelopt

_KEYS_OF_AWQ = {"w_bit": "bits", "q_group_size": "group_size"}
_FILES: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "hf_quant_config.json": lambda said: said,  # ModelOpt's, which reads the same there
    "quantize_config.json": lambda said: {"quant_method": gptq.METHOD, **said},
    "quant_config.json": lambda said: {
        "quant_method": awq.METHOD,
        **{_KEYS_OF_AWQ.get(key, key): value for key, value in said.items()},
    },
}
QUANTIZATION_FILES = tuple(_FILES)
"""Where ModelOpt, and older releases of AutoGPTQ and AutoAWQ, say how they quantised, if config.json does not."""

_OTHERS = ("fp8", compressed_config.METHOD, awq.METHOD, gptq.METHOD)


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a folder whose config.json is `config`; None: weights are as they are.

    Raises:
        CheckpointError: the tool's file cannot be read.
    """
    said = outermost(config, "quantization_config")
    if said is not None:
        return said
    for name, as_said in _FILES.items():
        if (folder / name).is_file():
            return as_said(read_object(folder / name))
    return None


def quantization_method(quantization: Mapping[str, Any] | None) -> str | None:
    """`quant_method` of a `quantization_config`, in one spelling where it has several; None where it names none."""
    if not quantization:
        return None
    named = quantization.get("quant_method")
    if modelopt.algorithm_of(quantization) in modelopt.ALGORITHMS and named not in _OTHERS:
        return modelopt.METHOD
    return named if isinstance(named, str) else None


def activations_of(quantization: Mapping[str, Any] | None) -> str | None:
    """How a `quantization_config` has activations quantised, for people; None: not at all."""
    method = quantization_method(quantization)
    if quantization is None or method is None:
        return None
    if method == "fp8":
        scheme = quantization.get("activation_scheme")
        return f"float8, {scheme}" if isinstance(scheme, str) else None
    if method == modelopt.METHOD:
        return modelopt.algorithm_of(quantization)
    if method == compressed_config.METHOD:
        return compressed_config.PackedSchemes(quantization, ()).activations
    return None
