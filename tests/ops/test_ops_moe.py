"""`moe_experts` against the token-by-token reference, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import moe_experts, reference


def experts(
    tokens: int, chosen: int, count: int, dim: int = 10, inner: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(count, generator=gen)[:chosen] for _ in range(tokens)])
    floats = [(tokens, dim), (tokens, chosen), (count, 2 * inner, dim), (count, dim, inner)]
    x, weights, gate_up, down = (torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype) for shape in floats)
    return x, ids, weights, gate_up, down


@pytest.mark.parametrize(("tokens", "chosen", "count"), [(1, 2, 8), (1, 1, 1), (40, 3, 6), (5, 2, 64), (33, 8, 8)])
def test_experts_match_the_reference(tokens: int, chosen: int, count: int) -> None:
    case = experts(tokens, chosen, count)
    out = moe_experts(*case)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), reference.moe_experts(*case), atol=1e-4, rtol=1e-5)


def test_bf16_experts_are_summed_in_float32_weights() -> None:
    x, ids, weights, gate_up, down = experts(20, 4, 8, dtype=torch.bfloat16)
    out = moe_experts(x, ids, weights.float(), gate_up, down)
    expected = reference.moe_experts(x, ids, weights.float(), gate_up, down)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=0.5, rtol=0.05)


@pytest.mark.parametrize("tokens", [1, 40])
def test_zero_experts_give_tokens_back_and_gradients_are_right(tokens: int) -> None:
    x, ids, weights, gate_up, down = experts(tokens, 3, 3, dim=4, inner=2, dtype=torch.float64)
    ids = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(t))[:3] for t in range(tokens)])
    for chosen in (ids, ids % 4 + 3):  # also none but zero experts
        out = moe_experts(x, chosen, weights, gate_up, down, num_zero_experts=4)
        torch.testing.assert_close(
            out, reference.moe_experts(x, chosen, weights, gate_up, down), atol=1e-12, rtol=1e-12
        )
    leaves = [t[:5].requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: moe_experts(x, ids[:5], w, g, d, num_zero_experts=4), leaves)


def test_gradients_are_right_and_experts_without_tokens_get_zero() -> None:
    x, ids, weights, gate_up, down = experts(3, 2, 4, dim=3, inner=2, dtype=torch.float64)
    ids = ids % 3  # the last expert sees nothing
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: moe_experts(x, ids, w, g, d), leaves)
    moe_experts(x, ids, weights, gate_up, down).sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad[3].abs().sum() == 0


def test_autocast_computes_the_products_in_bf16() -> None:
    case = experts(16, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_experts(*case)
    assert out.dtype == torch.float32
    exact = reference.moe_experts(*case)
    assert 1e-4 < ((out - exact).norm() / exact.norm()).item() < 2e-2


def test_a_token_does_not_depend_on_the_others() -> None:
    x, ids, weights, gate_up, down = experts(12, 2, 5, dtype=torch.float64)
    alone = moe_experts(x[7:8], ids[7:8], weights[7:8], gate_up, down)
    torch.testing.assert_close(alone, moe_experts(x, ids, weights, gate_up, down)[7:8], atol=1e-13, rtol=1e-13)


def test_no_tokens_give_an_empty_result() -> None:
    x, ids, weights, gate_up, down = experts(2, 2, 3)
    assert moe_experts(x[:0], ids[:0], weights[:0], gate_up, down).shape == (0, 10)


@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (1, torch.zeros(3, 2, dtype=torch.int64), "expert_ids has shape"),
        (1, torch.full((2, 2), 4), "name expert 4 of only 3"),
        (1, torch.full((2, 2), -1), "expert -1"),
        (2, torch.zeros(2, 1), "weights has shape"),
        (3, torch.zeros(3, 13, 10), "moe_experts takes gate_up"),
        (4, torch.zeros(3, 9, 7), "moe_experts takes gate_up"),
    ],
)
def test_what_does_not_fit_is_refused(index: int, replacement: Tensor, message: str) -> None:
    case = list(experts(2, 2, 3))
    case[index] = replacement
    with pytest.raises(OpError, match=message):
        moe_experts(*case)
