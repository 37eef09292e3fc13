"""`linear` of unpacked weights and `output_logits` against the float64 reference, gradients included."""

from __future__ import annotations

import sys

import pytest
import torch

from latentkv.errors import OpError
from latentkv.ops import linear, output_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_of_rounded_weights_are_not_rounded_again(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["latentkv.ops.linear"], "_WIDENED_NUMBERS", 100)
    x, weight = torch.randn(3, 2, 32).to(dtype), torch.randn(50, 32).to(dtype)
    logits = output_logits(x, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, atol=2e-5, rtol=1e-6)


def test_gradients_are_right() -> None:
    x, weight = torch.randn(3, 6).double().requires_grad_(), torch.randn(2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(linear, (x, weight))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OpError, match="linear takes"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
