from dataclasses import replace

import pytest

from latentkv import kernels
from latentkv.bench.ceilings import CeilingProbe
from latentkv.bench.ops import linear as module
from latentkv.bench.ops.linear import TORCH, TORCH_FP32, LinearReport, as_packed_format, measure_linear
from latentkv.bench.ops.report import linear_table
from latentkv.errors import OpError, RequestError

PROBE = CeilingProbe(gemm_size=16, buffer_mib=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROTATED_BYTES", 100_000)
    monkeypatch.setattr(module, "multiplies_bf16_fast", lambda: True)


@pytest.fixture
def report() -> LinearReport:
    return measure_linear(out_features=128, in_features=256, rows=[1, 20], repeats=2, probe=PROBE)


def test_every_number_of_rows_has_each_format_and_torch(report: LinearReport):
    compact = [] if kernels.extension is None else ["linear, compact"]
    names = [TORCH, "linear, bf16", *compact, "linear, int8", "torch, int8", "linear, int4", "torch, int4"]
    assert [(row.rows, row.contender) for row in report.rows] == [(m, n) for m in (1, 20) for n in names]
    assert linear_table(report).row_count == 2 * len(names)


def test_rates_count_the_stored_bytes_and_the_arithmetic(report: LinearReport):
    stored = {row.contender: row.weight_bytes for row in report.rows}
    assert stored.pop("linear, compact", None) == (None if kernels.extension is None else 49152 + 4 * 64)
    # 32,768 weights; int8 has a bf16 scale a row, int4 one for 128 weights; compact a line a block of 32 rows.
    int8, int4 = 32768 + 2 * 128, 16384 + 2 * 2 * 128
    assert stored == {
        TORCH: 65536,
        "linear, bf16": 65536,
        "linear, int8": int8,
        "torch, int8": int8,
        "linear, int4": int4,
        "torch, int4": int4,
    }
    row = report.rows[-1]
    assert row.gbps == pytest.approx(row.weight_bytes / row.us / 1e3)
    assert row.gflops == pytest.approx(2 * 20 * 128 * 256 / row.us / 1e3)
    assert row.of_read_ceiling == pytest.approx(row.gbps / row.read_ceiling)
    assert row.of_bf16_ceiling == pytest.approx(row.gflops / row.bf16_ceiling)


def test_torch_multiplies_float32_numbers_where_it_has_no_fast_product_of_bf16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "multiplies_bf16_fast", lambda: False)
    rows = measure_linear(out_features=128, in_features=256, rows=[20], formats=["bf16"], repeats=2, probe=PROBE).rows
    assert [(row.contender, row.weight_bytes) for row in rows] == [(TORCH_FP32, 131072), ("linear, bf16", 65536)]
    assert rows[0].times_faster_than_torch == 1


def test_compact_is_left_out_where_nothing_can_be_packed_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("latentkv.weights.compact.extension", None)
    assert list(module._entries(128, 256, ["bf16", "compact"])) == [TORCH, "linear, bf16"]


def test_scales_can_be_shared_by_fewer_weights():
    entries = module._entries(96, 256, ["int8", "int4"], group=32)
    assert entries["linear, int8"].weight_bytes == 24576 + 2 * 8 * 96
    assert entries["linear, int4"].weight_bytes == 12288 + 2 * 8 * 96
    with pytest.raises(OpError, match="groups of 33"):
        measure_linear(out_features=96, in_features=256, rows=[1], group=33, probe=PROBE)


@pytest.mark.parametrize(
    ("shape", "fmt", "group"), [((64, 256), "int8", 32), ((96, 256), "int4", 32), ((64, 72), "int4", 64)]
)
def test_torch_is_left_out_where_it_has_no_product_of_the_same_weights(shape: tuple[int, int], fmt: str, group: int):
    assert f"torch, {fmt}" not in module._entries(*shape, [fmt], group=group)


def test_matrices_are_used_in_turn_and_do_not_fit_in_the_cache():
    used: list[int] = []
    entry = module._entries(96, 256, ["int4"])["linear, int4"]
    assert entry.count * entry.weight_bytes >= 100_000
    counted = replace(entry, multiply=lambda x, index: used.append(index))
    step = module._step(counted, None, products=2)
    for _ in range(entry.count):
        step()
    assert used == [i % entry.count for i in range(2 * entry.count)]


def test_a_wrong_product_is_never_timed(monkeypatch: pytest.MonkeyPatch):
    right = module._packed_entry

    def off(packed: object, exact: object) -> module.LinearEntry:
        return replace(right(packed, exact), exact=exact * 1.1)

    monkeypatch.setattr(module, "_packed_entry", off)
    with pytest.raises(OpError, match="linear, bf16"):
        measure_linear(out_features=64, in_features=64, rows=[1], repeats=1, probe=PROBE)


@pytest.mark.parametrize("asked", [{"rows": []}, {"rows": [0]}, {"out_features": 0}])
def test_what_cannot_be_multiplied_is_refused(asked: dict[str, object]):
    with pytest.raises(RequestError):
        measure_linear(**{"repeats": 1, "probe": PROBE, **asked})


def test_an_unknown_format_is_refused():
    with pytest.raises(RequestError, match="int4"):
        as_packed_format("int3")
