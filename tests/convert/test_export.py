"""A checkpoint for vLLM says no more than vLLM reads, and means the same in LatentKV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sources import some_tokens, write_source
from transformers import AutoModelForCausalLM

from latentkv.checkpoint.reader import CheckpointReader
from latentkv.convert import ConvertOptions, HealOptions, convert_checkpoint, heal_checkpoint
from latentkv.convert.quality import compare_models
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.config import MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.loading import load_model
from latentkv.models.rope import attention_factor, inverse_frequencies

pytestmark = pytest.mark.usefixtures("unpainted")

TOKENS = some_tokens()


def for_vllm(rank: int | None = None, rope_dim: int | None = None, **others: object) -> ConvertOptions:
    return ConvertOptions(rank, rope_dim, export="vllm", **others)  # type: ignore[arg-type]


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.logits(model.forward_train(TOKENS))


def their_logits(folder: Path) -> torch.Tensor:
    """Those of transformers."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def frequencies(folder: Path) -> torch.Tensor:
    config = read_config(folder)
    return inverse_frequencies(config.rope, max_context=config.max_positions)


@pytest.mark.parametrize("rope_dim", [2, 4, 6, 16])
def test_the_frequencies_are_those_of_the_source_in_equal_steps_and_a_plain_rope(rope_dim: int, tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(24, rope_dim))
    every, found = frequencies(source), frequencies(tmp_path / "out")
    assert any(torch.allclose(every[::k][: len(found)], found, rtol=1e-11, atol=0) for k in range(1, 8))
    assert torch.allclose(torch.tensor(report.frequencies, dtype=torch.float64), found, rtol=1e-11, atol=0)
    saved, rope = json.loads((tmp_path / "out" / "config.json").read_text()), read_config(tmp_path / "out").rope
    plain = saved["rope_theta"] ** -(torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    assert torch.allclose(plain, found, rtol=1e-12, atol=0)
    assert (attention_factor(rope), rope.softmax_factor) == (1.0, 1.0)


def test_one_key_head_with_all_of_rope_loses_nothing_here_and_in_transformers(tmp_path: Path) -> None:
    source = write_source("mqa", tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(16, 16))
    expected = logits(source)
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((their_logits(tmp_path / "out") - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert (report.export, report.read_by) == ("vllm", ("latentkv", "vllm", "transformers"))


def test_another_eps_of_the_norms_is_the_latents_as_well_which_transformers_would_misread(tmp_path: Path) -> None:
    source = write_source("mqa tied", tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(16, 16))
    attention = read_config(tmp_path / "out").attention
    assert isinstance(attention, MLAConfig) and attention.latent_norm_eps == 1e-5
    expected = logits(source)
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((their_logits(tmp_path / "out") - expected).abs().max()) > 0.1 * float(expected.abs().max())
    assert report.read_by == ("latentkv", "vllm")


def test_a_head_that_was_the_embedding_is_written_by_itself(tmp_path: Path) -> None:
    source = write_source("mqa tied", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(16, 16))
    assert not read_config(tmp_path / "out").tie_word_embeddings
    reader = CheckpointReader(tmp_path / "out")
    assert torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))


def test_a_lossy_copy_gives_the_same_logits_here_and_in_transformers(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(24, 6))
    ours = logits(tmp_path / "out")
    assert float((their_logits(tmp_path / "out") - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_healing_leaves_what_vllm_reads_as_it_was(tmp_path: Path) -> None:
    source, out = write_source("llama tied", tmp_path / "source"), tmp_path / "out"
    convert_checkpoint(source, out, TOKENS, for_vllm(24, 6))
    before, config = compare_models(source, out, TOKENS), read_config(out)
    heal_checkpoint(out, source, TOKENS, HealOptions(steps=30, batch_size=4, lr=2e-3))
    assert compare_models(source, out, TOKENS)["divergence"] < 0.8 * before["divergence"]
    assert read_config(out) == config


def test_a_budget_leaves_out_sizes_whose_frequencies_form_no_plain_rope(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(kv_budget=0.5))
    assert [dim for _, dim, _ in report.forecasts] == [2, 4, 6, 8, 10, 12, 14, 16]
    best = min(report.forecasts, key=lambda each: each[2])
    assert (report.rank, report.rope_dim) == best[:2]
    assert report.rope_dim == 2 * len(set(report.frequencies))


def test_of_a_scaled_rope_what_forms_a_plain_one_will_do(tmp_path: Path) -> None:
    source = write_source("llama3 scaling", tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(kv_budget=0.5))
    assert [dim for _, dim, _ in report.forecasts] == [2, 4]
    with pytest.raises(ConfigError, match=r"--rope-dim=6 is not allowed with --export vllm.*at most 4, or --export tr"):
        convert_checkpoint(source, tmp_path / "other", TOKENS, for_vllm(24, 6))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen2", for_vllm(24, 8), "cannot carry the biases of this model's attention: give --export transformers"),
        ("llama with biases", for_vllm(kv_budget=0.5), "cannot carry the biases"),
        ("llama", for_vllm(24, 18), "--rope-dim=18 is not allowed with --export vllm.*at most 16"),
        ("llama", for_vllm(24, 8, method="svd"), "not by method=svd: give --export transformers"),
    ],
)
def test_what_vllm_cannot_read_is_refused_before_any_work(
    name: str, options: ConvertOptions, message: str, tmp_path: Path
) -> None:
    source = write_source(name, tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(source, tmp_path / "out", TOKENS, options)
    assert not (tmp_path / "out").exists()


def test_a_rope_that_scales_every_frequency_is_refused(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"frequencies of this model's RoPE \(linear\): give --export transformers"):
        convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(kv_budget=0.5))


def test_a_conversion_for_one_engine_does_not_go_on_as_one_for_another(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", TOKENS, for_vllm(24, 6))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(24, 6))
