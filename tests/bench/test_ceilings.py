from dataclasses import fields

import pytest
import torch

from latentkv.bench import ceilings as module
from latentkv.bench.ceilings import CeilingProbe, Ceilings, measure_ceilings
from latentkv.bench.timing import Timing
from latentkv.errors import RequestError

RATES = {field.name for field in fields(Ceilings)} - {"threads", "spread"}


def test_every_ceiling_is_measured():
    before = torch.get_num_threads()
    found = measure_ceilings(gemm_size=32, buffer_mib=1, repeats=3, threads=2)
    assert found.threads == 2
    assert min(getattr(found, name) for name in RATES) > 0
    assert set(found.spread) == RATES
    assert torch.get_num_threads() == before


def test_rates_are_work_over_the_median_time_of_the_fastest_reader(monkeypatch: pytest.MonkeyPatch):
    seconds = {
        "bf16": 0.5,
        "fp32": 2.0,
        "int8": 0.1,
        "sum": 0.5,
        "maximum": 0.25,
        "dot product with itself": 1.0,
        "one thread, bf16": 4.0,
        "one thread, sum": 1.0,
        "one thread, maximum": 2.0,
        "one thread, dot product with itself": 3.0,
    }
    monkeypatch.setattr(
        module, "time_interleaved", lambda contenders, repeats: {n: Timing((9.0, seconds[n], 0.0)) for n in contenders}
    )
    monkeypatch.setattr(module, "multiplies_bf16_fast", lambda: True)
    found = measure_ceilings(gemm_size=10, buffer_mib=1, repeats=3)
    # A product of two 10 x 10 matrices is 2 * 10^3 operations; a MiB is 2^20 bytes.
    assert found.bf16_gflops == pytest.approx(2000 / 0.5 / 1e9)
    assert found.fp32_gflops == pytest.approx(2000 / 2.0 / 1e9)
    assert found.int8_gops == pytest.approx(2000 / 0.1 / 1e9)
    assert found.one_thread_bf16_gflops == pytest.approx(2000 / 4.0 / 1e9)
    assert found.read_gbps == pytest.approx(2**20 / 0.25 / 1e9)
    assert found.one_thread_read_gbps == pytest.approx(2**20 / 1.0 / 1e9)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_matrices_are_multiplied_as_fast_as_torch_can(fast: bool, monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(module, "multiplies_bf16_fast", lambda: fast)
    multiply = torch.Tensor.__matmul__

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked.append(left.dtype)
        return multiply(left, right)

    probe = CeilingProbe(gemm_size=10, buffer_mib=1)
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    product = probe.contenders["bf16 ceiling"].step()
    assert isinstance(product, torch.Tensor) and product.dtype == torch.bfloat16
    assert asked == [torch.bfloat16 if fast else torch.float32]


def test_a_product_that_would_take_long_is_measured_on_smaller_matrices(monkeypatch: pytest.MonkeyPatch):
    def took(seconds: float) -> None:
        monkeypatch.setattr(
            module, "time_interleaved", lambda contenders, **_: {name: Timing((seconds,)) for name in contenders}
        )

    took(0.9 / 8)
    assert module._product(512, module._int8_step).operations == 2 * 512**3
    took(1.1 / 8)
    assert module._product(512, module._int8_step).operations == 2 * 256**3


def test_sizes_of_nothing_are_refused():
    with pytest.raises(RequestError, match="gemm_size"):
        measure_ceilings(gemm_size=0)


def test_a_probe_gives_rates_from_timings_taken_in_turn():
    probe = CeilingProbe(gemm_size=10, buffer_mib=1)
    assert all(contender.step() is not None for contender in probe.contenders.values())
    timings = {"bf16 ceiling": Timing((0.5,)), "read ceiling": Timing((0.25,)), "another": Timing((1.0,))}
    assert probe.rates(timings) == pytest.approx((2000 / 0.5 / 1e9, 2**20 / 0.25 / 1e9))
