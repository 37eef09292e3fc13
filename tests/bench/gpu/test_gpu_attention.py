"""The GPU's benchmark and its tuning, run small through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from command_line import run_here
from latentkv.bench.gpu import attention as module
from latentkv.bench.gpu.attention import CASES, GpuCase, measure_gpu_attention
from latentkv.bench.gpu.report import gpu_attention_table, tuned_table
from latentkv.bench.gpu.timing import GpuCeilings, time_on
from latentkv.bench.gpu.tune import all_candidates, tune_attention
from latentkv.bench.timing import Timing
from latentkv.errors import OpError, RequestError
from latentkv.kernels import has_triton, use_backend
from latentkv.ops.triton.blocks import NVIDIA, AttendBlocks, AttendShape, attend_shared_bytes
from latentkv.ops.triton.tuned import read_tuned, shape_key
from triton_interpreter import patch_language_once

CPU = torch.device("cpu")
SMALL = GpuCase(heads=2, batch=2, context=20)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not has_triton():
        pytest.skip("triton is not installed: pip install 'latentkv[gpu]'")
    if torch.cuda.is_available():
        pytest.skip("with a GPU here, Triton does not interpret")
    patch_language_once(monkeypatch)
    monkeypatch.setattr(module, "PAGE_SIZE", 16)  # whole pages are written, which the interpreter is slow at
    with use_backend("triton"):
        yield


@pytest.mark.usefixtures("interpreted")
def test_every_case_has_a_row_for_each_format_with_its_rates() -> None:
    ceilings = GpuCeilings(CPU, gemm_size=16, buffer_mib=1)
    report = measure_gpu_attention(CPU, cases=[SMALL], repeats=1, calls=1, ceilings=ceilings)
    assert [(row.heads, row.batch, row.context, row.kv_format) for row in report.rows] == [
        (2, 2, 20, "bf16"),
        (2, 2, 20, "fp8"),
    ]
    bf16, fp8 = report.rows
    # 2 FLOPs for each of 576 + 512 numbers a head and cached token.
    assert bf16.tflops == pytest.approx(2 * 2 * 1088 * 40 / bf16.ms / 1e9)
    assert bf16.gbps == pytest.approx(1152 * 40 / bf16.ms / 1e6)
    assert fp8.gbps == pytest.approx(656 * 40 / fp8.ms / 1e6)
    assert fp8.of_copy_ceiling == pytest.approx(fp8.gbps / fp8.copy_ceiling)
    assert bf16.of_bf16_ceiling == pytest.approx(bf16.tflops / bf16.bf16_ceiling)
    assert 0 < bf16.max_error < 0.02
    assert gpu_attention_table(report).row_count == 2


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_answer_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = module.PagedCase.step
    monkeypatch.setattr(module.PagedCase, "step", lambda self: step(self) * 1.1)
    with pytest.raises(OpError, match="bf16 pages differs from the float64 answer"):
        measure_gpu_attention(CPU, cases=[SMALL], repeats=1, ceilings=GpuCeilings(CPU, gemm_size=16, buffer_mib=1))


@pytest.mark.usefixtures("interpreted")
def test_tuning_keeps_the_fastest_sizes(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    sizes = [AttendBlocks(16, 32, 512, 4, 1), AttendBlocks(16, 16, 1024, 4, 1)]
    (row,) = tune_attention(
        CPU, path, cases=[SMALL], kv_formats=["bf16"], candidates=lambda shape, shared: sizes, repeats=1
    )
    assert (row.tried, row.ms <= row.default_ms) == (3, True)
    shape = AttendShape(2, 512, 64, torch.bfloat16, torch.bfloat16)
    (stored,) = read_tuned(path).values()
    assert AttendBlocks(**stored[shape_key(shape)]) == row.blocks
    assert tuned_table([row]).row_count == 1


def test_candidates_fit_and_are_many() -> None:
    shape = AttendShape(128, 512, 64, torch.bfloat16, torch.bfloat16)
    sizes = all_candidates(shape, NVIDIA[90])
    assert len(sizes) > 20
    assert all(attend_shared_bytes(shape, s.rows, s.tokens, s.num_stages) <= NVIDIA[90].size for s in sizes)
    assert all(s.chunk % s.tokens == 0 for s in sizes)


def test_the_cases_are_those_that_are_published_and_one_sequence_alone() -> None:
    assert [c.context for c in CASES if (c.heads, c.batch) == (128, 128)] == [4096, 8192, 16384, 32768]
    assert [c.context for c in CASES if (c.heads, c.batch) == (16, 1)] == [32768, 131072]


def test_ceilings_count_flops_and_the_bytes_read_and_written() -> None:
    ceilings = GpuCeilings(CPU, gemm_size=10, buffer_mib=2)
    rates = ceilings.rates({"bf16 ceiling": Timing((1e-6,)), "copy ceiling": Timing((1e-3,))})
    assert rates == (pytest.approx(2e-3), pytest.approx(4.194304))


def test_steps_are_timed_in_turn() -> None:
    order: list[str] = []
    timings = time_on(CPU, {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=1, calls=2)
    assert order == ["a", "a", "b", "b"] * 3
    assert all(len(timing.seconds) == 1 for timing in timings.values())
    with pytest.raises(RequestError, match="at least 1"):
        time_on(CPU, {}, repeats=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["attention", "tune"])
def test_without_a_gpu_it_says_so_in_one_sentence(command: str) -> None:
    result = run_here("bench", command, "--device", "cuda")
    assert result.exit_code != 0
    assert "device='cuda' cannot be used" in str(result.exception) + result.output


def test_a_cpu_is_refused_where_triton_is_not_named() -> None:
    with pytest.raises(RequestError, match="cannot be measured on cpu: Triton's kernels run on a GPU"):
        measure_gpu_attention(CPU)


def test_options_without_a_use_on_a_gpu_are_refused() -> None:
    result = run_here("bench", "attention", "--device", "cuda", "--plot", "a.png", "--threads", "2")
    assert result.exit_code != 0
    assert "without --threads, --plot" in str(result.exception) + result.output
