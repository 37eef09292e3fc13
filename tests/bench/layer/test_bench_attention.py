from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import CEILINGS

from latentkv.bench.layer import attention as module
from latentkv.bench.layer.attention import CONTENDERS, TOLERANCE, AttentionReport, measure_attention
from latentkv.bench.layer.contenders import (
    LATENTKV,
    TRANSFORMERS,
    Entry,
    latentkv_entry,
    mha_entries,
    transformers_entry,
)
from latentkv.bench.ops.decode_case import DecodeCase
from latentkv.bench.plot import plot_attention
from latentkv.bench.report import attention_table
from latentkv.bench.shapes import AttentionShape
from latentkv.errors import OpError, RequestError
from latentkv.models.config import MLAConfig

PLAIN = AttentionShape(64, 4, MLAConfig(32, 16, 8, 16))
BOTTLENECK = AttentionShape(96, 3, MLAConfig(48, 24, 16, 12, q_lora_rank=40))


@pytest.fixture(scope="module")
def report() -> AttentionReport:
    return measure_attention(PLAIN, contexts=[64, 128], repeats=3, ceilings=CEILINGS)


@pytest.mark.parametrize("shape", [PLAIN, BOTTLENECK], ids=["no bottleneck", "query bottleneck"])
@pytest.mark.parametrize("context", [2, 64, 65, 200])
@torch.inference_mode()
def test_all_contenders_give_the_float64_answer(shape: AttentionShape, context: int):
    case = DecodeCase.random(shape, context, seed=context)
    entries: dict[str, Entry] = {"LatentKV": latentkv_entry(case, "bf16"), **mha_entries(case)}
    for attention in ("sdpa", "eager"):
        entries[f"transformers, {attention}"] = transformers_entry(case, attention)
    expected = case.expected()
    for name, entry in entries.items():
        for _ in range(2):  # the second step must find the cache as the first found it
            if entry.prepare is not None:
                entry.prepare()
            error = (entry.step().double() - expected).abs().max() / expected.abs().max()
            assert error < TOLERANCE["bf16"], name


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8", "fp8"])
@torch.inference_mode()
def test_every_cache_format_is_within_its_tolerance_and_its_plan(kv_format: str):
    report = measure_attention(PLAIN, contexts=[100], kv_format=kv_format, repeats=1, ceilings=CEILINGS)
    measured = report.rows[0].measured
    assert measured is not None
    assert measured.cache_bytes == measured.planned_cache_bytes
    assert 0 < measured.max_error <= TOLERANCE[kv_format]


@torch.inference_mode()
def test_the_answer_depends_on_every_weight_and_on_the_whole_past():
    case = DecodeCase.random(PLAIN, 3)  # few tokens, so that the new one weighs much
    answer = case.expected()
    for name, weight in case.weights.items():
        changed = replace(case, weights=case.weights | {name: weight.flip(0)})
        assert (changed.expected() - answer).abs().max() > 0.05 * answer.abs().max(), name
    for field in ("latents", "k_rope"):
        changed = replace(case, **{field: getattr(case, field).flip(1)})
        assert (changed.expected() - answer).abs().max() > 0.05 * answer.abs().max(), field


def test_the_table_is_complete(report: AttentionReport):
    assert [(row.context, row.contender) for row in report.rows] == [(c, n) for c in (64, 128) for n in CONTENDERS]
    for row in report.rows:
        m = row.measured
        assert m is not None
        assert m.ms > 0
        assert m.times_faster_than_transformers is not None
        assert m.gflops == pytest.approx(m.gflop / m.ms * 1e3)
        assert m.of_bf16_ceiling == pytest.approx(m.gflops / 200)
        assert m.of_read_ceiling == pytest.approx(m.gbps / 20)
    assert attention_table(report).row_count == len(report.rows)


def test_every_cache_has_allocated_what_plan_says(report: AttentionReport):
    # L + R = 40 numbers a token for latents; 4 heads of 16 + 8 + 16 for keys and values; 2 bytes each.
    bytes_per_token = {LATENTKV: 80, TRANSFORMERS: 80, "MHA, SDPA": 320, "MHA, matmul": 320}
    for row in report.rows:
        assert row.measured is not None
        expected = bytes_per_token[row.contender] * row.context
        assert row.measured.cache_bytes == row.measured.planned_cache_bytes == expected


def test_bandwidth_counts_weights_and_cache_once(report: AttentionReport):
    # Weights: q 64 x 96, kv_a 64 x 40, norm 32, kv_b 128 x 32, o 64 x 64, in 2 bytes.
    weights = 2 * (64 * 96 + 64 * 40 + 32 + 128 * 32 + 64 * 64)
    measured = report.rows[0].measured
    assert measured is not None
    assert measured.gbps == pytest.approx((weights + 80 * 64) / measured.ms * 1e3 / 1e9)


def test_the_plot_is_a_png(report: AttentionReport, tmp_path: Path):
    plot_attention(report, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_without_transformers_its_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def missing(case: DecodeCase, attention: str) -> Entry:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(module, "transformers_entry", missing)
    report = measure_attention(PLAIN, contexts=[64], repeats=1, ceilings=CEILINGS)
    rows = {row.contender: row for row in report.rows}
    assert list(rows) == list(CONTENDERS)
    assert rows[TRANSFORMERS].measured is None
    assert "pip install transformers" in rows[TRANSFORMERS].note
    measured = rows[LATENTKV].measured
    assert measured is not None
    assert measured.times_faster_than_transformers is None
    assert attention_table(report).row_count == len(CONTENDERS)
    plot_attention(report, tmp_path / "three_lines.png")


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_answer_is_never_timed(monkeypatch: pytest.MonkeyPatch, wrong: float):
    def off(case: DecodeCase, kv_format: str) -> Entry:
        entry = latentkv_entry(case, "bf16")
        return replace(entry, step=lambda: entry.step() * wrong)

    monkeypatch.setattr(module, "latentkv_entry", off)
    with pytest.raises(OpError, match="LatentKV differs"):
        measure_attention(PLAIN, contexts=[64], repeats=1, ceilings=CEILINGS)


@pytest.mark.parametrize("asked", [{"contexts": []}, {"contexts": [1]}, {"transformers_attention": "flash"}])
def test_what_cannot_be_measured_is_refused(asked: dict[str, object]):
    with pytest.raises(RequestError):
        measure_attention(PLAIN, repeats=1, ceilings=CEILINGS, **asked)
