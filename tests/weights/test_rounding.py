"""Plain rounding: each weight to the nearest number of its group's."""

from __future__ import annotations

import pytest
import torch

from latentkv.weights.formats import CODE_FORMATS
from latentkv.weights.rounding import round_plainly


@pytest.mark.parametrize("name", sorted(CODE_FORMATS))
def test_tiny_weights_beside_a_large_one_become_numbers_near_zero(name: str) -> None:
    weight = torch.tensor([2.95, 6.4e-6, -6.4e-6, 1e-9, -1e-9, 0.0, 3e-4, -3e-4]).repeat(1, 16)
    rounded = round_plainly(weight, CODE_FORMATS[name], 128).dequantize()
    assert bool(rounded.isfinite().all())
    assert float((rounded[weight < 1] - weight[weight < 1]).abs().max()) < 0.51
