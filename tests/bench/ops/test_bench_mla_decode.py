from dataclasses import replace

import pytest
import torch

from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.ops import mla_decode as module
from latentkv.bench.ops.mla_decode import INT8_PRODUCTS, TORCH, DecodeInputs, DecodeReport, measure_mla_decode
from latentkv.bench.ops.report import mla_decode_table
from latentkv.errors import OpError, RequestError
from latentkv.kernels import has_int8_products

PROBE = CeilingProbe(gemm_size=16, buffer_mib=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROM_MEMORY", 300_000)


@pytest.fixture
def report() -> DecodeReport:
    return measure_mla_decode(heads=[1, 3], contexts=[2, 130], batches=[1, 2], repeats=2, probe=PROBE)


def test_every_case_has_a_row_for_each_format_and_for_torch(report: DecodeReport):
    products = [INT8_PRODUCTS] if has_int8_products() else []
    names = [*(f"mla_decode, {name} pages" for name in ("bf16", "int8", "fp8")), *products, TORCH]
    expected = [(h, c, b, n) for h in (1, 3) for c in (2, 130) for b in (1, 2) for n in names]
    assert [(row.heads, row.context, row.batch, row.contender) for row in report.rows] == expected
    assert mla_decode_table(report).row_count == len(expected)


def test_rates_are_those_of_the_arithmetic_and_the_cache(report: DecodeReport):
    row = next(r for r in report.rows if (r.heads, r.context, r.batch) == (3, 130, 2))
    # 2 FLOPs for each of 576 + 512 numbers a head, cached token and sequence; 1152 bytes a token.
    assert row.gflops == pytest.approx(2 * 3 * 1088 * 130 * 2 / row.ms / 1e6)
    assert row.gbps == pytest.approx(1152 * 130 * 2 / row.ms / 1e6)
    assert row.of_bf16_ceiling == pytest.approx(row.gflops / row.bf16_ceiling)
    assert row.of_read_ceiling == pytest.approx(row.gbps / row.read_ceiling)


def test_a_step_reads_enough_layers_to_come_from_memory():
    assert DecodeInputs.random(1, 130, 1).layers == 3  # 149,760 bytes each
    entry = module.mla_decode_entry(DecodeInputs.random(1, 130, 1), "bf16")
    assert len({cache.data_ptr() for cache in entry.caches}) == 3


def test_a_wrong_answer_is_never_timed(monkeypatch: pytest.MonkeyPatch):
    def off(inputs: DecodeInputs) -> module.DecodeEntry:
        entry = module.mla_decode_entry(inputs, "bf16")
        return replace(entry, layer=lambda pages: entry.layer(pages) * 1.1)

    monkeypatch.setattr(module, "torch_entry", off)
    with pytest.raises(OpError, match="torch matmul"):
        measure_mla_decode(heads=[2], contexts=[64], batches=[1], repeats=1, probe=PROBE)


@torch.inference_mode()
def test_the_expected_answer_depends_on_every_sequence_and_key():
    inputs = DecodeInputs.random(4, 3, 2)
    answer = inputs.expected()
    for token in range(3):
        latents = inputs.latents.clone()
        latents[1, token] += 1
        changed = replace(inputs, latents=latents).expected()
        assert torch.equal(changed[0], answer[0])
        assert (changed[1] - answer[1]).abs().max() > 0.01


@pytest.mark.parametrize("asked", [{"heads": []}, {"contexts": [0]}, {"batches": [0]}, {"kv_formats": ["fp7"]}])
def test_what_cannot_be_decoded_is_refused(asked: dict[str, object]):
    with pytest.raises(RequestError):
        measure_mla_decode(**{"repeats": 1, "probe": PROBE, **asked})
