"""Scales that leave the least squared error, looked for among a few, for blocks of weights on their way into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Parts of the scale at which the largest weight just has a code; clipping more never pays. Then to both sides of the
# best so far. Each ends with least-squares steps from the codes that the best scale leads to.
_SHRINK = {8: (1.0, 0.996, 0.992, 0.988, 0.984), 6: (1.0, 0.97, 0.94, 0.91), 5: (1.0, 0.94, 0.88, 0.82)}
_SHRINK_4 = (1.0, 0.88, 0.76, 0.64)
_STEPS = {8: (), 6: (0.015,), 5: (0.03, 0.015), 4: (0.06, 0.03)}
_LEAST_SQUARES_STEPS = 2

Rounding = Callable[[Tensor], Tensor]
"""What becomes of scales when they are stored."""


def stored_half(numbers: Tensor) -> Tensor:
    """As float16 stores them, in float32."""
    return numbers.half().float()


def symmetric_scales(groups: Tensor, importance: Tensor | None, bits: int, stored: Rounding) -> Tensor:
    """The scale of each group of weights = scale * code, codes from -2^(bits - 1) to 2^(bits - 1) - 1 (8 bits: -127).

    Plain rounding's scale (of the largest magnitude, and ggml's, of the sign that gives the largest weight the lowest
    code) is among those tried, so no group's error is larger than that.

    Args:
        groups: float32 [..., n].
        importance: what each squared error counts, [..., n] or what broadcasts to it; None: all the same.
        bits: of a code.
        stored: rounds a scale as it will be stored.

    Returns:
        float32 [..., 1], rounded by `stored`; any sign.
    """
    lowest, highest = code_range(bits)
    top, bottom = groups.amax(-1, keepdim=True), (-groups).amax(-1, keepdim=True)
    widest = torch.maximum(top, bottom)
    toward = widest / highest if bits == 8 else torch.where(top >= bottom, -widest, widest) / -lowest
    best = stored(widest / highest)
    error = symmetric_error(groups, importance, best, bits)

    def try_all(scales: Iterable[Tensor]) -> None:
        nonlocal best, error
        for scale in map(stored, scales):
            found = symmetric_error(groups, importance, scale, bits)
            better = found < error
            best, error = torch.where(better, scale, best), torch.where(better, found, error)

    try_all(toward * part for part in _SHRINK.get(bits, _SHRINK_4))
    for step in _STEPS[bits]:
        try_all((best + toward * step, best - toward * step))
    for _ in range(_LEAST_SQUARES_STEPS):
        codes = symmetric_codes(groups, best, bits)
        weighted = codes if importance is None else codes * importance
        try_all([ratio((weighted * groups).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True))])
    return best


def symmetric_codes(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes of [..., n] for scales [..., 1], as float32 integers."""
    return (groups * inverse(scales)).round_().clamp_(*code_range(bits))


def symmetric_error(groups: Tensor, importance: Tensor | None, scales: Tensor, bits: int) -> Tensor:
    """Squared error of each group, [..., 1]."""
    return squared(symmetric_codes(groups, scales, bits).mul_(scales).sub_(groups), importance)


def squared(errors: Tensor, importance: Tensor | None) -> Tensor:
    """Sum of squares over the last axis, [..., 1]; `errors` is overwritten."""
    errors.square_()
    return (errors if importance is None else errors.mul_(importance)).sum(-1, keepdim=True)


def code_range(bits: int) -> tuple[int, int]:
    """Lowest and highest of a width's signed codes."""
    return (-127, 127) if bits == 8 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def inverse(scales: Tensor) -> Tensor:
    """1 / scale, 0 where that is infinite: of groups of zeros, or of numbers too small to have a scale."""
    found = scales.reciprocal()
    return found.masked_fill_(found.isinf(), 0.0)


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """A quotient, 0 where nothing divides."""
    return torch.where(under == 0, 0.0, over / torch.where(under == 0, 1.0, under))
