"""How long a sequence a model takes: what its card says, and what transformers reads at that length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from latentkv import LLM
from latentkv.errors import ConfigError
from latentkv.models.config_reader import read_config

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
CARDS: dict[str, tuple[int, dict[str, Any], int]] = {
    "Qwen2.5 with its card's recipe": (
        32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "Qwen3 with its card's recipe": (
        40960,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "DeepSeek-V3": (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
    "Kimi-K2-0905": (262144, {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096}, 262144),
    "yarn without its original length": (1024, {"type": "yarn", "factor": 2.5}, 2560),
    "yarn without its factor": (4096, {"type": "yarn", "original_max_position_embeddings": 1024}, 4096),
    "a shrinking factor": (1024, {"type": "linear", "factor": 0.5}, 1024),
    "Llama 3.1": (131072, LLAMA3 | {"factor": 8.0}, 131072),
    "Llama 3.2": (131072, LLAMA3 | {"factor": 32.0}, 131072),
    "llama3 with the field left": (8192, LLAMA3 | {"factor": 8.0}, 65536),
    "Vicuna 1.5 16k": (4096, {"type": "linear", "factor": 4.0}, 16384),
    "Phi-3 128k": (131072, {"type": "su", "original_max_position_embeddings": 4096, **FACTORS}, 131072),
    "longrope with the field left": (
        4096,
        {"type": "longrope", "factor": 8.0, "original_max_position_embeddings": 4096, **FACTORS},
        32768,
    ),
    "unscaled": (2048, {"rope_type": "default"}, 2048),
    "dynamic, whose keys would change their meaning beyond": (2048, {"type": "dynamic", "factor": 4.0}, 2048),
}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "original outside"])
@pytest.mark.parametrize("name", CARDS)
def test_the_context_is_what_the_card_says_however_it_is_spelt(name: str, spelling: str) -> None:
    positions, scaling, context = CARDS[name]
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4}
    config |= {"max_position_embeddings": positions}
    scaling = dict(scaling)
    if spelling == "original outside" and "original_max_position_embeddings" in scaling:
        config["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if spelling == "rope_parameters":
        config["rope_parameters"] = scaling | {"rope_theta": 5000.0}
    else:
        config |= {"rope_scaling": scaling, "rope_theta": 5000.0}
    read = read_config(config)
    assert read.max_positions == context
    assert read.rope.theta == 5000.0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -4.0])
def test_a_factor_that_is_no_length_is_refused_by_name(value: float) -> None:
    with pytest.raises(ConfigError, match=r"factor is .*finite number above 0"):
        read_config({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": value}})


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["type"],
)
def test_tokens_past_the_field_are_read_as_transformers_reads_them(tmp_path: Path, scaling: dict[str, Any]) -> None:
    config = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config |= {"tie_word_embeddings": False, "rope_theta": 100.0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **config, rope_scaling=dict(scaling)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(tmp_path)
    written = {**config, "model_type": "qwen2", "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(written))
    llm = LLM(tmp_path, dtype="fp32")
    ids = [7 * i % 96 for i in range(64 if scaling["type"] == "dynamic" else 200)]
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([ids])).logits[0]
    assert float((llm.logits(ids) - expected).abs().max() / expected.abs().max()) < 1e-4
    if scaling["type"] == "dynamic":
        with pytest.raises(ConfigError, match=r"2 to 64 tokens.*dynamic"):
            LLM(tmp_path, max_context=128)
