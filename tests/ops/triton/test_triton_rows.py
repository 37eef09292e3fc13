"""`rms_norm`, `apply_rope` and `merge_states` on Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentkv.ops import apply_rope, merge_states, reference, rms_norm

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)]
)
@pytest.mark.parametrize("dim", [3, 201, 2048])
def test_rms_norm_matches_the_reference(run: Run, dtype: torch.dtype, tolerance: float, dim: int) -> None:
    x, weight = torch.randn(5, dim + 9).to(dtype)[:, 4 : 4 + dim], torch.randn(dim)
    normed = run(rms_norm, x, weight, 1e-5)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), reference.rms_norm(x, weight, 1e-5), atol=tolerance, rtol=tolerance)


def test_rms_norm_takes_any_number_of_dimensions(run: Run) -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    exact = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(run(rms_norm, x, weight, 1e-5).double(), exact, atol=1e-6, rtol=1e-6)


def test_rms_norm_rounds_the_normed_numbers_before_the_weight_as_checkpoints_were_trained(run: Run) -> None:
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    exact = reference.rms_norm(x, torch.ones(32), 1e-6)
    same = run(rms_norm, x, weight, 1e-6) == weight * exact.float().bfloat16()
    assert same.float().mean() > 0.999  # a GPU's square root may turn a number that lies between two


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 5, 17])
def test_rope_turns_slices_in_place_too(run: Run, interleaved: bool, dtype: torch.dtype, heads: int) -> None:
    x, phase = torch.randn(6, heads, 5 + 12).to(dtype)[..., 5:], torch.randn(6, 6)
    cos, sin = phase.cos(), phase.sin()
    expected = reference.apply_rope(x, cos, sin, interleaved=interleaved)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    turned = run(apply_rope, x, cos[:, None], sin[:, None], interleaved=interleaved)
    torch.testing.assert_close(turned.double(), expected, atol=tolerance, rtol=tolerance)
    key = run(apply_rope, x[:, 0], cos, sin, interleaved=interleaved)
    assert torch.equal(key, turned[:, 0])

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x, cos[:, None].to(x.device), sin[:, None].to(x.device), interleaved=interleaved, out=x)

    assert torch.equal(run(in_place, x), turned)


def test_merging_matches_the_reference_and_an_empty_part_changes_nothing(run: Run) -> None:
    gen = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(5, 3, 24, generator=gen) for _ in range(2))
    lse_a, lse_b = (torch.randn(5, 3, generator=gen) * 10 for _ in range(2))
    lse_a[0], lse_b[1], lse_a[2, 0], lse_b[2, 0] = (float("-inf"),) * 4
    merged = run(merge_states, out_a, lse_a, out_b, lse_b)
    for actual, expected in zip(merged, reference.merge_states(out_a, lse_a, out_b, lse_b), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_very_large_and_very_different_sums_do_not_overflow_and_nan_shows(run: Run) -> None:
    lse_a, lse_b = torch.tensor([900.0, float("nan")]), torch.tensor([-900.0, 0.0])
    out, lse = run(merge_states, torch.ones(2, 1), lse_a, torch.zeros(2, 1), lse_b)
    assert (out[0].item(), lse[0].item()) == (1, 900)
    assert out[1].isnan().all()
    assert lse[1].isnan()
