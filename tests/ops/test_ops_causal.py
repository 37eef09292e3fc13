import pytest
import torch

from latentkv.ops.causal import BLOCK, causal_attention


def _definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    length = q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return ((q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_causal_attention_and_its_gradients_equal_the_definition(
    length: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(length)
    shapes = ((2, length, 3, 24), (2, length, 3, 24), (2, length, 3, 16))
    inputs = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(shapes[2]).to(dtype)
    out = causal_attention(*inputs, scale=0.2)
    expected = _definition(*inputs, 0.2)
    assert out.dtype == dtype
    pairs = zip((out, *torch.autograd.grad(out, inputs, grad)),
                (expected, *torch.autograd.grad(expected, inputs, grad.double())), strict=True)  # fmt: skip
    for got, wanted in pairs:
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm() + 1e-4


@pytest.mark.parametrize("chosen", [False, True], ids=["all", "selected"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_sinks_and_their_gradients_equal_the_definition(dtype: torch.dtype, tolerance: float, chosen: bool) -> None:
    torch.manual_seed(3)
    length, shapes = 33, ((2, 33, 3, 24), (2, 33, 3, 24), (2, 33, 3, 16))
    inputs = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    sinks = (torch.randn(3) * 2).requires_grad_()
    seen = torch.ones(2, length, length, dtype=torch.bool).tril()
    selected = (torch.rand(2, length, length) < 0.4).logical_or(torch.eye(length).bool()) & seen if chosen else None
    out = causal_attention(*inputs, scale=0.2, selected=selected, sinks=sinks)
    q, k, v = (x.double().transpose(1, 2) for x in inputs)
    exps = (q @ k.mT * 0.2).exp() * (seen if selected is None else selected)[:, None]
    expected = ((exps / (exps.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None])) @ v).transpose(1, 2)
    assert out.dtype == dtype
    given, grad = [*inputs, sinks], torch.randn(shapes[2]).to(dtype)
    pairs = zip((out, *torch.autograd.grad(out, given, grad)),
                (expected, *torch.autograd.grad(expected, given, grad.double())), strict=True)  # fmt: skip
    for got, wanted in pairs:
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm() + 1e-4
