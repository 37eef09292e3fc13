"""`mla_prefill` on Triton's kernels against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from ops_cases import assert_meets_bar, tenth
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import mla_prefill, reference

Run = Callable[..., Any]


def ragged(
    q_lens: list[int], kv_lens: list[int], *, heads: int = 3, dim: int = 24, value_dim: int = 16, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q, k, v = (
        tenth((sum(lens), heads, width), dtype, seed)
        for seed, (lens, width) in enumerate([(q_lens, dim), (kv_lens, dim), (kv_lens, value_dim)])
    )
    return q, k, v, *(torch.tensor([0, *accumulate(lens)]) for lens in (q_lens, kv_lens))


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([70], [70]),  # all new, more than a tile
        ([7, 1, 30], [90, 33, 30]),  # a past, a decode step, all new
        ([5, 0, 4, 3], [2, 6, 0, 3]),  # more rows than keys, no rows, no keys
    ],
)
def test_ragged_prefill_meets_the_bar(
    run: Run, dtype: torch.dtype, causal: bool, q_lens: list[int], kv_lens: list[int]
) -> None:
    case = ragged(q_lens, kv_lens, dtype=dtype)
    out, lse = run(mla_prefill, *case, scale=5.0, causal=causal)
    assert out.dtype == dtype
    assert_meets_bar((out, lse), reference.mla_prefill(*case, scale=5.0, causal=causal))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (24, 40), (16, 16), (32, 256), (40, 136), (7, 3)])
def test_keys_and_values_may_differ_in_width_either_way(run: Run, dim: int, value_dim: int) -> None:
    case = ragged([20], [51], dim=dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert_meets_bar(run(mla_prefill, *case, scale=1.0), reference.mla_prefill(*case, scale=1.0))


def test_float32_is_accurate_to_float32(run: Run) -> None:
    case = ragged([9, 3], [150, 3], dtype=torch.float32)
    for actual, exact in zip(run(mla_prefill, *case, scale=4.0), reference.mla_prefill(*case, scale=4.0), strict=True):
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_bounds_on_the_cpu_are_checked(run: Run) -> None:
    case = ragged([9], [9], dtype=torch.float32)
    with pytest.raises(OpError, match="kv_start must rise"):
        run(mla_prefill, *case[:4], torch.tensor([0, 10]), scale=1.0)
