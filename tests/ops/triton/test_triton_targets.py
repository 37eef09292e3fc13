"""Every kernel compiles for GPUs that are not here, fits into their shared memory, and copies in the background."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forked_program import run_forked
from latentkv.kernels import has_triton

KERNELS = {
    "plan_kernel",
    "number_items_kernel",
    "attend_kernel",
    "merge_chunks_kernel",
    "prefill_kernel",
    "write_kernel",
    "rms_norm_kernel",
    "rope_kernel",
    "merge_states_kernel",
    "gate_up_kernel",
    "down_kernel",
    "add_choices_kernel",
}

PIPELINED = {"attend_kernel", "prefill_kernel", "gate_up_kernel", "down_kernel"}

PROGRAM = """
import os, runpy, sys
os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
os.environ["TRITON_CACHE_DIR"], program = sys.argv[3:]
del sys.argv[3:]
runpy.run_path(program, run_name="__main__")
"""

pytestmark = pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install 'latentkv[gpu]'")


@pytest.mark.parametrize(
    ("target", "extent"),
    [
        ("sm_90", "some"),
        pytest.param("sm_80", "all", marks=pytest.mark.slow),
        pytest.param("sm_89", "all", marks=pytest.mark.slow),
        pytest.param("sm_90", "all", marks=pytest.mark.slow),
        pytest.param("sm_100", "all", marks=pytest.mark.slow),
        pytest.param("sm_120", "all", marks=pytest.mark.slow),
        pytest.param("gfx942", "all", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_and_fits(target: str, extent: str, tmp_path: Path) -> None:
    code, printed, said = run_forked(PROGRAM, target, extent, tmp_path, Path(__file__).with_name("compile_kernels.py"))
    assert code == 0, said[-3000:]
    compiled = json.loads(printed.splitlines()[-1])
    assert {kernel["name"] for kernel in compiled} == KERNELS
    assert [kernel for kernel in compiled if kernel["shared_bytes"] > kernel["limit"]] == []
    assert [kernel for kernel in compiled if kernel["tensor_columns"] > 512] == []
    if target.startswith("sm_"):  # loads that the compiler does not see to be wide are not copied in the background
        assert {kernel["name"] for kernel in compiled if kernel["async_copies"]} == PIPELINED
