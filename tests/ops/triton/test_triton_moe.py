"""`moe_experts` on Triton's kernels against the token-by-token reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkv.ops import moe_experts, reference

Run = Callable[..., Any]


def experts(tokens: int, chosen: int, count: int, dim: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(count, generator=gen)[:chosen] for _ in range(tokens)])
    shapes = [(tokens, dim), (tokens, chosen), (count, 2 * inner, dim), (count, dim, inner)]
    x, weights, gate_up, down = (torch.randn(*shape, generator=gen) / shape[-1] ** 0.5 for shape in shapes)
    return x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype)


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize(
    ("tokens", "chosen", "count", "dim", "inner"),
    [(1, 2, 8, 10, 7), (1, 1, 1, 40, 33), (40, 3, 6, 70, 20), (5, 2, 32, 16, 16), (100, 1, 2, 24, 24)],
)
def test_experts_match_the_reference(
    run: Run, dtype: torch.dtype, tolerance: float, tokens: int, chosen: int, count: int, dim: int, inner: int
) -> None:
    case = experts(tokens, chosen, count, dim, inner, dtype)
    out = run(moe_experts, *case)
    expected = reference.moe_experts(*case)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


def test_all_tokens_may_choose_one_expert_and_others_none_and_a_residual_is_added(run: Run) -> None:
    x, ids, weights, gate_up, down = experts(50, 2, 5, 12, 9, torch.float32)
    case = x, ids * 0 + 3, weights, gate_up, down
    residual = torch.randn(50, 12)
    expected = reference.moe_experts(*case) + residual
    torch.testing.assert_close(run(moe_experts, *case, residual=residual).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_zero_experts_give_tokens_back(run: Run, dtype: torch.dtype, tolerance: float) -> None:
    x, _, _, gate_up, down = experts(20, 1, 3, 70, 9, dtype)
    x, residual = torch.cat([x, x], dim=1)[:, :70], torch.randn(20, 70).to(dtype)  # rows of a wider tensor
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(20)])
    weights = torch.rand(20, 3)
    for chosen in (ids, ids % 5 + 3):  # also none but zero experts
        out = run(moe_experts, x, chosen, weights, gate_up, down, residual=residual, num_zero_experts=5)
        expected = reference.moe_experts(x, chosen, weights, gate_up, down) + residual.double()
        torch.testing.assert_close(out.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


def test_not_a_number_stays_with_its_token(run: Run) -> None:
    case = experts(9, 2, 3, 12, 9, torch.float32)
    case[0][4, 7] = float("nan")
    assert run(moe_experts, *case).isnan().sum(dim=1).tolist() == [0, 0, 0, 0, 12, 0, 0, 0, 0]
