import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import CEILINGS

from command_line import run_here
from latentkv.bench import ceilings as ceilings_module
from latentkv.bench import shapes
from latentkv.bench.ceilings import CeilingProbe, Ceilings
from latentkv.bench.layer import attention as attention_module
from latentkv.bench.layer import sparse as sparse_module
from latentkv.bench.models import speculation as speculation_module
from latentkv.bench.ops import linear as linear_module
from latentkv.bench.ops import mla_decode as mla_decode_module
from latentkv.bench.shapes import AttentionShape
from latentkv.errors import RequestError
from latentkv.models.config import MLAConfig

SPARSE = {
    "model_type": "deepseek_v32",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_hidden_layers": 1,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 3,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def ceilings(*, repeats: int = 1, threads: int | None = None) -> Ceilings:
        return replace(CEILINGS, threads=threads or 1)

    monkeypatch.setattr(attention_module, "measure_ceilings", ceilings)
    monkeypatch.setattr(ceilings_module, "measure_ceilings", ceilings)
    monkeypatch.setattr(mla_decode_module, "CeilingProbe", lambda: CeilingProbe(gemm_size=16, buffer_mib=1))
    monkeypatch.setattr(linear_module, "CeilingProbe", lambda: CeilingProbe(gemm_size=16, buffer_mib=1))
    monkeypatch.setattr(mla_decode_module, "FROM_MEMORY", 1)
    monkeypatch.setattr(linear_module, "ROTATED_BYTES", 1)
    monkeypatch.setattr(shapes, "SHAPES", {"v2-lite": AttentionShape(64, 4, MLAConfig(32, 16, 8, 16))})


def test_attention_prints_a_line_for_each_contender_and_writes_its_files(tmp_path: Path):
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    command = ["attention", "--contexts", "64,0.125k", "--repeats", "1", "--heads", "2"]
    result = run_here("bench", *command, "--json", json_file, "--plot", plot)
    assert result.exit_code == 0, result.output
    for text in (
        "LatentKV",
        "transformers, sdpa",
        "MHA, SDPA",
        "MHA, matmul",
        "equal",
        "bf16 matrix product",
        "2 heads",
    ):
        assert text in result.output
    read = json.loads(json_file.read_text())
    assert sorted({row["context"] for row in read["rows"]}) == [64, 128]
    assert read["shape"]["num_heads"] == 2
    assert plot.exists()


def test_mla_decode_prints_a_line_for_each_case_and_writes_its_files(tmp_path: Path):
    json_file, plot = tmp_path / "d.json", tmp_path / "d.png"
    command = ["mla-decode", "--heads", "2", "--contexts", "64,128", "--batches", "1", "--kv-dtypes", "bf16"]
    result = run_here("bench", *command, "--repeats", "1", "--json", json_file, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert result.output.count("mla_decode, bf16") == result.output.count("torch matmul") == 2
    assert len(json.loads(json_file.read_text())["rows"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_sparse_prints_a_layer_both_ways_and_its_parts_and_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparse_module, "CeilingProbe", lambda: CeilingProbe(gemm_size=16, buffer_mib=1))
    monkeypatch.setattr(sparse_module, "FROM_MEMORY", 1)
    (tmp_path / "config.json").write_text(json.dumps(SPARSE))
    json_file = tmp_path / "s.json"
    command = ["sparse", str(tmp_path), "--contexts", "64,128", "--repeats", "1", "--kv-dtype", "int8"]
    result = run_here("bench", *command, "--json", json_file)
    assert result.exit_code == 0, result.output
    assert result.output.count("sparse layer") == result.output.count("scores and choice") == 2
    rows = json.loads(json_file.read_text())["rows"]
    assert [(row["context"], row["contender"].strip()) for row in rows[4:]] == [
        (128, "dense layer"),
        (128, "sparse layer"),
        (128, "scores and choice"),
        (128, "attention to the chosen"),
    ]


def test_linear_prints_a_line_for_each_case_and_writes_its_numbers(tmp_path: Path):
    json_file = tmp_path / "l.json"
    command = ["linear", "--size", "64x128", "--rows", "1,3", "--formats", "int8", "--repeats", "1"]
    result = run_here("bench", *command, "--json", json_file)
    assert result.exit_code == 0, result.output
    assert result.output.count("linear, int8") == len(re.findall("torch, (?:bf16|fp32)", result.output)) == 2
    assert json.loads(json_file.read_text())["in_features"] == 128


def test_speculation_prints_a_line_for_each_way_of_drafting_and_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(speculation_module, "_SEEDS", range(1))
    json_file = tmp_path / "s.json"
    command = ["speculation", "--new-tokens", "6", "--repeats", "1", "--speculate", "2", "--temperatures", "0.8"]
    result = run_here("bench", *command, "--json", json_file)
    assert result.exit_code == 0, result.output
    rows = json.loads(json_file.read_text())["rows"]
    ways = ["none", "n-gram", "n-gram, always", "MTP", "both", "MTP, always 1", "MTP, always 2"]
    assert [(row["prompt"], row["drafts"]) for row in rows] == [
        (prompt, way) for prompt in ("prose", "repetitive") for way in ways
    ]
    assert all(row["same_text"] for row in rows)
    assert all(row["accepted"] > 0 and row["tokens_per_step"] > 1 for row in rows if "MTP, always" in row["drafts"])
    assert all(row["times_faster"] == 1 and row["drafted"] == 0 for row in rows if row["drafts"] == "none")


def test_ceilings_are_printed_and_written(tmp_path: Path):
    result = run_here("bench", "ceilings", "--json", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    assert "200.0 GFLOP/s" in result.output
    assert json.loads((tmp_path / "c.json").read_text())["ceilings"]["read_gbps"] == 20.0


@pytest.mark.parametrize(
    "command",
    [
        ["attention", "--shape", "v9"],
        ["attention", "--heads", "3"],
        ["attention", "--heads", "0"],
        ["attention", "--kv-dtype", "fp7"],
        ["attention", "--contexts", "many"],
        ["attention", "--json", "/no/such/folder/a.json"],
        ["attention", "--plot", "/no/such/folder/a.png"],
        ["ceilings", "--json", "/no/such/folder/c.json"],
        ["mla-decode", "--heads", "none"],
        ["mla-decode", "--kv-dtypes", "bf16,fp7"],
        ["mla-decode", "--plot", "/no/such/folder/a.png"],
        ["linear", "--size", "8192"],
        ["linear", "--formats", "int3"],
        ["linear", "--json", "/no/such/folder/l.json"],
        ["make-model", "v9", "/no/such/folder"],
        ["model", "--json", "/no/such/folder/m.json"],
        ["speculation", "--json", "/no/such/folder/s.json"],
        ["speculation", "--temperatures", "warm"],
    ],
)
def test_bad_options_give_a_typed_error_before_anything_is_measured(command: list[str]):
    result = run_here("--debug", "bench", *command)
    assert isinstance(result.exception, RequestError)
