"""Projections that files have stacked are read one by one: whole, quantised, and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from latentkv.checkpoint import CheckpointReader
from latentkv.checkpoint.unfused import UnfusedTensors
from latentkv.errors import CheckpointError
from latentkv.models.loading import load_model
from latentkv.models.stored_config import open_checkpoint
from latentkv.quantize import quantize_checkpoint

STACK = {"attn.qkv": {"attn.q": 4, "attn.k": 2, "attn.v": 2}, "mlp.gate_up": {"mlp.gate": 3, "mlp.up": 3}}
TENSORS = {
    "m.attn.qkv.weight": torch.arange(48.0).view(8, 6),
    "m.attn.qkv.bias": torch.arange(8.0),
    "m.mlp.gate_up.weight": torch.arange(36.0).view(6, 6),
    "m.norm.weight": torch.ones(6),
}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by transformers; do not change it."""
    folder = tmp_path_factory.mktemp("phi3")
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2}
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Phi3Config(**sizes, **heads, initializer_range=0.2, eos_token_id=2, pad_token_id=0)
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_each_projection_is_its_rows_of_the_stack(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensors = UnfusedTensors(CheckpointReader(tmp_path), STACK)
    assert sorted(tensors.names) == [
        *("m.attn.k.bias", "m.attn.k.weight", "m.attn.q.bias", "m.attn.q.weight", "m.attn.v.bias", "m.attn.v.weight"),
        *("m.mlp.gate.weight", "m.mlp.up.weight", "m.norm.weight"),
    ]
    rows = {"m.attn.q": slice(0, 4), "m.attn.k": slice(4, 6), "m.attn.v": slice(6, 8)}
    for name, own in rows.items():
        for leaf in ("weight", "bias"):
            expected = TENSORS[f"m.attn.qkv.{leaf}"][own]
            assert torch.equal(tensors.read(f"{name}.{leaf}"), expected)
            assert tensors.read(f"{name}.{leaf}", torch.bfloat16).dtype == torch.bfloat16
            assert tensors.shape(f"{name}.{leaf}") == tuple(expected.shape)
            assert tensors.nbytes(f"{name}.{leaf}") == expected.nbytes
    assert torch.equal(tensors.read("m.mlp.up.weight"), TENSORS["m.mlp.gate_up.weight"][3:])
    assert torch.equal(tensors.reopened().read("m.norm.weight"), TENSORS["m.norm.weight"])
    assert "m.attn.q.weight" in tensors and "m.norm.weight" in tensors and "m.attn.qkv.weight" not in tensors


def test_a_stack_with_another_number_of_rows_is_refused_by_name(phi3: Path, tmp_path: Path) -> None:
    tensors = load_file(phi3 / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][1:].clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((phi3 / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"{name} has the shape .* and self_attn.q_proj, .* have 80 rows"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_a_quantised_copy_has_projections_apart_and_is_read_again(phi3: Path, tmp_path: Path, fmt: str) -> None:
    quantize_checkpoint(phi3, tmp_path / "out", fmt)
    names = CheckpointReader(tmp_path / "out").names
    assert "model.layers.0.self_attn.q_proj.weight" in names and not any("qkv_proj" in name for name in names)
    copy, original = load_model(tmp_path / "out"), load_model(phi3)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, exact = (model.logits(model.forward_train(tokens)).float() for model in (copy, original))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < {"int8": 0.05, "int4": 0.5}[fmt]
