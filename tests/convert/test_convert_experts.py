"""Mixtures of experts are converted as dense models are, their experts and routers copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import EXPERTS, SIZES, some_tokens, their_logits, their_model, write_source
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from latentkv.convert import ConvertOptions, HealOptions, convert_checkpoint, heal_checkpoint
from latentkv.convert.quality import compare_models
from latentkv.errors import ConfigError
from latentkv.models.loading import load_model

pytestmark = pytest.mark.usefixtures("unpainted")

TOKENS = some_tokens()


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_and_routers_are_the_sources_bit_for_bit_also_where_experts_are_stored_together(
    name: str, tmp_path: Path
) -> None:
    source = write_source(name, tmp_path / "source", torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(rank=16, rope_dim=8))
    before, after = (load_model(folder).state_dict() for folder in (source, tmp_path / "out"))
    copied = [key for key in before if ".mlp." in key or "layernorm" in key]
    assert {key.rsplit(".mlp.")[-1] for key in copied if ".mlp." in key} == {
        *("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    assert all(torch.equal(before[key], after[key]) for key in copied)


def write_model_without_variation(folder: Path) -> Path:
    """A Qwen3 with experts whose norms are next to linear: eps rules their roots, the weights make up for it."""
    torch.manual_seed(3)
    config = Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True, rms_norm_eps=1e8)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(5e3, 1.5e4)
    model.save_pretrained(folder)
    return folder


def test_where_norms_on_queries_and_keys_do_not_vary_everything_is_kept_here_and_in_transformers(
    tmp_path: Path,
) -> None:
    source = write_model_without_variation(tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(rank=64, rope_dim=64))
    assert max(row.norm_variation for row in report.layers) < 1e-6
    expected = their_logits(source, TOKENS)
    scale = 1e-5 * float(expected.abs().max())
    assert float((their_logits(tmp_path / "out", TOKENS) - expected).abs().max()) < scale
    model = load_model(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert float((model.logits(model.forward_train(TOKENS)) - expected).abs().max()) < scale


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe, dense first"])
def test_healing_brings_a_mixture_of_experts_nearer_and_transformers_still_reads_all_of_it(
    name: str, tmp_path: Path
) -> None:
    source, out = write_source(name, tmp_path / "source"), tmp_path / "out"
    report = convert_checkpoint(source, out, TOKENS, ConvertOptions(rank=24, rope_dim=8))
    assert report.read_by == ("latentkv", "transformers")
    before = compare_models(source, out, TOKENS)
    heal_checkpoint(out, source, TOKENS, HealOptions(steps=30, batch_size=4, lr=2e-3))
    assert compare_models(source, out, TOKENS)["divergence"] < 0.8 * before["divergence"]
    model = load_model(out, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model.forward_train(TOKENS))
        theirs = their_model(out)(TOKENS).logits
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "qwen3 moe, dense first",
            {"mlp_only_layers": [1]},
            r"dense layers \(1\) behind layers with experts.*without mlp_only_layers and decoder_sparse_step",
        ),
        ("qwen3 moe, dense first", {"mlp_only_layers": [], "decoder_sparse_step": 2}, r"dense layers \(2\) behind"),
        ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}, "a single expert"),
    ],
)
def test_layers_that_mistral_4_cannot_say_are_refused_before_weights_are_looked_at(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_source(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(kv_budget=0.5))
    assert not (tmp_path / "out").exists()


def test_experts_are_not_written_for_vllm(tmp_path: Path) -> None:
    source = write_source("mixtral", tmp_path / "source")
    with pytest.raises(ConfigError, match="cannot carry the experts of this model: give --export transformers"):
        convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(kv_budget=0.5, export="vllm"))
