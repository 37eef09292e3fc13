"""How a checkpoint says that its weights are quantised: in config.json, or in ModelOpt's file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentkv.checkpoint.locate import read_object
from latentkv.checkpoint.wrapper import outermost
from latentkv.weights.files import awq, compressed_config, gptq, modelopt

MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt says how it quantised, if config.json does not."""


_OTHERS = ("fp8", compressed_config.METHOD, awq.METHOD, gptq.METHOD)


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a folder whose config.json is `config`; None: weights are as they are.

    Raises:
        CheckpointError: ModelOpt's file cannot be read.
    """
    said = outermost(config, "quantization_config")
    if said is None and (folder / MODELOPT_FILE).is_file():
        return read_object(folder / MODELOPT_FILE)
    return said


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
