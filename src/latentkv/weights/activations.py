"""Activations rounded to 8 bits, where they meet quantised weights: products are then those of integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

RUN = 32
"""Activations that share a scale, at most; those of two groups of weights share none. `csrc/linear_int8_tile.h`."""

_LARGEST, _LEAST = 127, 1e-30
"""What the largest number of a run becomes; if it is smaller than the second, all of the run count as 0."""


def round_to_int8(x: Tensor, group: int) -> Tensor:
    """Activations [..., D] as integers from -127 to 127 times the scale of their run, float32.

    A run is that of `group` weights which share a scale, or 32 of them. It becomes NaN where one of its numbers is not
    finite. The kernels do the same, bit for bit.
    """
    groups = -(-x.shape[-1] // group)
    grouped = functional.pad(x.float(), (0, groups * group - x.shape[-1])).unflatten(-1, (groups, group))
    runs = functional.pad(grouped, (0, -group % RUN)).unflatten(-1, (-1, RUN))
    largest = runs.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, _LARGEST)  # torch multiplies the reciprocal by a plain number, which rounds twice
    scales = torch.where(largest.isfinite(), torch.where(largest < _LEAST, 0, largest / most), torch.nan)
    rounded = (runs * torch.where(scales > 0, most / largest, 0)).round() * scales
    return rounded.flatten(-2)[..., :group].flatten(-2)[..., : x.shape[-1]]
