"""`gqa_attend` on every instruction set against the float64 reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from ops_cases import Paged, assert_meets_bar, gqa_case, token_slots
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import gqa_attend, reference

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (9, 3), (8, 1), (64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mha_gqa_and_mqa_meet_the_bar(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = gqa_case([1, 5, 2, 1], [17, 5, 50, 0], heads=heads, kv_heads=kv_heads, dtype=dtype)
    assert_meets_bar(gqa_attend(*case.args, scale=2.0), reference.gqa_attend(*case.args, scale=2.0))


def test_sliding_windows_never_read_what_lies_before_them() -> None:
    case = gqa_case([20], [90], heads=4, kv_heads=2, page_size=7)
    start = case.stop - 24
    case.pages.view(-1, 2, 2, 32)[token_slots(case.table, 0, int(start[0]), 7)] = float("nan")
    expected = reference.gqa_attend(*case.args, scale=1.0, start=start)
    assert_meets_bar(gqa_attend(*case.args, scale=1.0, start=start), expected)


@cache
def long_case() -> tuple[Paged, tuple[Tensor, Tensor]]:
    """Many chunks and blocks of rows, and the reference's result: the same for every instruction set."""
    case = gqa_case([300], [2200], heads=16, kv_heads=4, head_dim=8, page_size=64, dtype=torch.float32)
    return case, reference.gqa_attend(*case.args, scale=3.0)


def test_many_chunks_and_blocks_of_rows_are_accurate_to_float32() -> None:
    case, (expected, expected_lse) = long_case()
    out, lse = gqa_attend(*case.args, scale=3.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)


def test_a_sequence_does_not_change_by_a_bit_with_the_rest_of_the_batch() -> None:
    case = gqa_case([2, 3], [40, 1100], heads=6, kv_heads=3, page_size=9, dtype=torch.float32)
    out, _ = gqa_attend(*case.args, scale=1.0)
    alone, _ = gqa_attend(case.q[2:], case.pages, case.table[1:], torch.tensor([0, 3]), case.stop[2:], scale=1.0)
    assert torch.equal(out[2:], alone)


def test_heads_that_cannot_share_evenly_are_refused() -> None:
    case = gqa_case([1], [5], heads=5, kv_heads=2)
    with pytest.raises(OpError, match="5 query heads cannot share 2"):
        gqa_attend(*case.args, scale=1.0)


def test_pages_of_another_head_dim_are_refused() -> None:
    case = gqa_case([1], [5], heads=2, kv_heads=2)
    with pytest.raises(OpError, match="kv_pages has shape"):
        gqa_attend(case.q[..., :31], *case.args[1:], scale=1.0)
