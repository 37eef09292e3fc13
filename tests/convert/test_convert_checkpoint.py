"""A conversion that keeps everything changes nothing; one that does not says what it cost."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import CONFIGS, WITH_NORMS, some_tokens, their_logits, write_source

from latentkv.convert import REPORT_FILE, ConvertOptions, convert_checkpoint
from latentkv.convert.options import Method
from latentkv.convert.report import ConversionReport
from latentkv.errors import CheckpointError, ConfigError
from latentkv.models.config import MLAConfig
from latentkv.models.loading import load_model
from latentkv.quantize.gguf import plan_gguf, write_gguf

pytestmark = pytest.mark.usefixtures("unpainted")

TOKENS = some_tokens()
Conversion = tuple[Path, Path, ConversionReport]
HALF = ConvertOptions(kv_budget=0.5)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """(source, converted, report) at half the cache, for tests that change nothing in them."""
    folder = tmp_path_factory.mktemp("halved")
    source = write_source("llama", folder / "source")
    return source, folder / "out", convert_checkpoint(source, folder / "out", TOKENS, HALF)


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.logits(model.forward_train(tokens))


def everything(folder: Path) -> ConvertOptions:
    """The sizes that lose nothing."""
    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = config["num_key_value_heads"] * head
    return ConvertOptions(rank=width, rope_dim=width)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_ranks_and_all_of_rope_the_logits_are_the_sources_here_and_in_transformers(
    name: str, tmp_path: Path
) -> None:
    source = write_source(name, tmp_path / "source")
    expected = their_logits(source, TOKENS)
    convert_checkpoint(source, tmp_path / "out", TOKENS, everything(source))
    scale = float(expected.abs().max())
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 1e-5 * scale
    assert float((their_logits(tmp_path / "out", TOKENS) - expected).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("name", ["llama", "llama3 scaling", "qwen2", "granite", "mixtral"])
def test_a_lossy_copy_gives_the_same_logits_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    source = write_source(name, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(rank=24, rope_dim=12))
    ours = logits(tmp_path / "out")
    assert float((their_logits(tmp_path / "out", TOKENS) - ours).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize("name", WITH_NORMS)
def test_norms_on_queries_and_keys_are_folded_in_at_their_mean_and_how_much_they_vary_is_said(
    name: str, tmp_path: Path
) -> None:
    source = write_source(name, tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "out", TOKENS, everything(source))
    for row in report.layers:  # nothing is lost but what the norms vary by
        assert 0.05 < row.norm_variation < 0.5
        assert 0 < row.output_error < 4 * row.norm_variation**2
    ours = logits(tmp_path / "out")
    assert float((their_logits(tmp_path / "out", TOKENS) - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_bf16_weights_stay_bf16_and_are_as_near_as_bf16_is(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source", torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out", TOKENS, everything(source))
    model = load_model(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected, found = logits(source), logits(tmp_path / "out")
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_a_gguf_file_is_converted_as_the_folder_it_was_made_of(tmp_path: Path) -> None:
    source = write_source("llama", tmp_path / "source")
    write_gguf(plan_gguf(source, "f32"), tmp_path / "model.gguf")
    options = ConvertOptions(rank=24, rope_dim=8)
    for place in (source, tmp_path / "model.gguf"):
        convert_checkpoint(place, tmp_path / f"of {place.name}", TOKENS, options)
    found, expected = logits(tmp_path / "of model.gguf"), logits(tmp_path / "of source")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_more_cache_costs_less_quality_and_the_report_says_what_was_cached(halved: Conversion, tmp_path: Path) -> None:
    source, half, report_of_half = halved
    conversions = {0.5: (half, report_of_half)}
    for budget in (0.25, 0.75):
        out = tmp_path / str(budget)
        conversions[budget] = (out, convert_checkpoint(source, out, TOKENS, ConvertOptions(kv_budget=budget)))
    errors = []
    for budget, (out, report) in sorted(conversions.items()):
        assert report.cached_after == report.rank + report.rope_dim == int(report.cached_before * budget)
        assert report.cached_before == 2 * 4 * 16
        attention = load_model(out).config.attention
        assert isinstance(attention, MLAConfig)
        assert (attention.kv_lora_rank, attention.qk_rope_head_dim) == (report.rank, report.rope_dim)
        errors.append(sum(row.output_error for row in report.layers))
    assert errors[0] > errors[1] > errors[2] > 0


def test_the_sizes_with_the_least_measured_error_are_taken(halved: Conversion) -> None:
    _, _, report = halved
    best = min(report.forecasts, key=lambda each: each[2])
    assert len(report.forecasts) > 3 and (report.rank, report.rope_dim) == best[:2]


@pytest.mark.parametrize("stop_after", ["survey 1", "convert 1"])
def test_a_conversion_that_was_killed_goes_on_and_gives_the_same_bytes(
    halved: Conversion, stop_after: str, tmp_path: Path
) -> None:
    source, whole, _ = halved
    again: list[str] = []

    def killed(what: str, done: int, total: int) -> None:
        if f"{what} {done}" == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", TOKENS, HALF, on_progress=killed)
    assert not (tmp_path / "out" / "config.json").exists()
    convert_checkpoint(
        source, tmp_path / "out", TOKENS, HALF, on_progress=lambda what, done, total: again.append(f"{what} {done}")
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    if stop_after.startswith("convert"):
        assert not any(step.startswith("survey") for step in again)


def test_the_same_call_again_does_nothing_and_another_one_is_refused(
    halved: Conversion,
) -> None:
    source, out, report = halved
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert_checkpoint(source, out, TOKENS, ConvertOptions(kv_budget=0.5)) == report
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_checkpoint(source, out, TOKENS, ConvertOptions(kv_budget=0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --rank or --kv-budget"),
        ({"rank": 8, "kv_budget": 0.5}, "either --rank or --kv-budget"),
        ({"rank": 0, "rope_dim": 4}, "--rank must be a whole number from 1"),
        ({"rank": 129, "rope_dim": 4}, "1 to 128"),
        ({"rank": 125, "rope_dim": 4}, "--rank=125 is not allowed with --rope-dim=4, which leaves at most 124"),
        ({"rank": 8}, "--rank needs --rope-dim"),
        ({"rank": 8, "rope_dim": 3}, "--rope-dim=3 is not allowed"),
        ({"rank": 8, "rope_dim": 66}, "--rope-dim=66 is not allowed"),
        ({"kv_budget": 0.0}, "--kv-budget must be a number above 0 and at most 1, not 0.0"),
        ({"kv_budget": 1.5}, "--kv-budget must be a number above 0 and at most 1, not 1.5"),
        ({"kv_budget": 0.01}, "too few for this model"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_sentence_and_nothing_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_source("llama", tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(source, tmp_path / "out", TOKENS, ConvertOptions(**options))
    assert not (tmp_path / "out" / "config.json").exists()


def test_models_that_cannot_be_converted_are_refused_by_name(halved: Conversion, tmp_path: Path) -> None:
    source, converted, _ = halved
    with pytest.raises(ConfigError, match="latent attention already"):
        convert_checkpoint(converted, tmp_path / "out", TOKENS, ConvertOptions(kv_budget=0.5))
    shutil.copytree(write_source("mistral", tmp_path / "mistral"), tmp_path / "windowed")
    config = json.loads((tmp_path / "windowed" / "config.json").read_text())
    (tmp_path / "windowed" / "config.json").write_text(json.dumps(config | {"sliding_window": 32}))
    with pytest.raises(ConfigError, match="sliding windows"):
        convert_checkpoint(tmp_path / "windowed", tmp_path / "out", TOKENS, ConvertOptions(kv_budget=0.5))
    shutil.copytree(source, tmp_path / "biased")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    with pytest.raises(ConfigError, match="biases in its feed-forward layers"):
        convert_checkpoint(tmp_path / "biased", tmp_path / "out", TOKENS, ConvertOptions(kv_budget=0.5))


@pytest.mark.parametrize("method", ["weighted", "svd", "transmla"])
def test_a_source_that_lacks_a_tensor_or_has_one_too_many_is_refused_before_anything_is_written(
    method: Method, tmp_path: Path
) -> None:
    source, options = write_source("llama", tmp_path / "source"), ConvertOptions(rank=32, rope_dim=16, method=method)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks {name} \[64, 64\]: the download is incomplete"):
        convert_checkpoint(source, tmp_path / "out", TOKENS, options)
    bias = "model.layers.1.self_attn.q_proj.bias"
    save_file(weights | {bias: torch.zeros(128)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds {bias} \[128\], which its config.json has no place for"):
        convert_checkpoint(source, tmp_path / "out", TOKENS, options)
    assert not (tmp_path / "out").exists()


def test_the_report_is_in_the_folder_and_finite(halved: Conversion) -> None:
    _, out, report = halved
    stored = json.loads((out / REPORT_FILE).read_text())
    assert stored["rank"] == report.rank and len(stored["layers"]) == 2
    assert stored["cache"] == {"dtype": "fp32", "before": 2 * 128 * 4, "after": 2 * 64 * 4}
    assert all(math.isfinite(value) for row in stored["layers"] for value in row.values())
    stored.pop("fingerprint")
    assert ConversionReport.from_json(stored) == report
    damages: list[tuple[dict[str, Any], str]] = [
        ({"layers": []}, "it has no layers"),
        ({"layers": [{}]}, "is missing"),
        ({"frequencies": ["x"]}, "frequencies is no float"),
        ({"cache": 3}, "cache is no object"),
        ({"export": "nothing"}, "export is none of 'transformers', 'vllm'"),
    ]
    for damage, said in damages:
        with pytest.raises(ValueError, match=said):
            ConversionReport.from_json(stored | damage)


def test_a_conversion_of_an_earlier_version_is_known_by_the_fingerprint_that_it_wrote(tmp_path: Path) -> None:
    source, options = write_source("llama", tmp_path / "source"), ConvertOptions(rank=16, rope_dim=8)
    convert_checkpoint(source, tmp_path / "out", TOKENS, options)
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in source.glob("*.safetensors")]
    described = json.dumps([files, asdict(options), list(TOKENS.shape)], sort_keys=True)
    expected = hashlib.sha256(described.encode() + TOKENS.numpy().tobytes()).hexdigest()
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["fingerprint"] == expected


def test_a_damaged_resume_state_is_one_sentence_that_names_it_and_the_remedy(tmp_path: Path) -> None:
    source, options = write_source("llama", tmp_path / "source"), ConvertOptions(rank=16, rope_dim=8)
    state = tmp_path / "out" / ".converting"

    def killed(what: str, done: int, total: int) -> None:
        if (what, done) == ("convert", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", TOKENS, options, on_progress=killed)
    for name in ("conversion.json", "plan.json", "layer-0.json", "hidden-0.f32"):
        whole = (state / name).read_bytes()
        of_another_type = [] if name == "conversion.json" else [b"{}", b'{"row": 1}', b"3"]
        for damage in (b"", whole[:-5], b"[" * 100_000, *of_another_type):
            (state / name).write_bytes(damage)
            with pytest.raises(CheckpointError, match=rf"{name} .*: remove the folder") as refused:
                convert_checkpoint(source, tmp_path / "out", TOKENS, options)
            assert "\n" not in str(refused.value)
        (state / name).write_bytes(whole)
    assert len(convert_checkpoint(source, tmp_path / "out", TOKENS, options).layers) == 2
