"""LoRA adapters as PEFT writes them, made without it, and what numpy makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

RANK, ALPHA = 3, 5


def write_adapter(folder: Path, model: Path, modules: list[str], *, seed: int = 0, **config: Any) -> Path:
    """An adapter of random matrices for modules of a model, by their names in its files; `rank_pattern` counts."""
    generator, stored = np.random.default_rng(seed), load_file(model / "model.safetensors")
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        ranks = [rank for end, rank in config.get("rank_pattern", {}).items() if module.endswith(end)]
        rank = ranks[0] if ranks else RANK
        outputs, inputs = stored[f"{module}.weight"].shape
        a, b = generator.normal(size=(rank, inputs)), generator.normal(size=(outputs, rank))
        if "embed" in module:  # [V, D], with A over tokens
            a, b = generator.normal(size=(rank, outputs)), generator.normal(size=(inputs, rank))
        ends = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        for end, matrix in zip(ends, (a, b), strict=True):
            tensors[f"base_model.model.{module}.{end}"] = matrix.astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": modules, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def merged(model: Path, adapter: Path) -> dict[str, np.ndarray]:
    """All tensors of a model, with the adapter's products added in float64."""
    tensors, parts = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, a in parts.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        b = parts[name.replace("_A", "_B")]
        rank = len(a)
        alphas = [alpha for end, alpha in config.get("alpha_pattern", {}).items() if module.endswith(end)]
        scale = (alphas or [config["lora_alpha"]])[0] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        delta = scale * b.astype(np.float64) @ a.astype(np.float64)
        weight = tensors[f"{module}.weight"].astype(np.float64) + (delta.T if "embedding" in name else delta)
        tensors[f"{module}.weight"] = weight.astype(np.float32)
    return tensors
