"""Weights -> GGUF's Q4_K and Q6_K: the mirror of `k_blocks.py`.

Each function takes float32 [B, 256], and how much each weight's error counts ([B, 256], or None), and returns the bytes
of blocks, uint8 [B, bytes]. Scales are looked for twice: those of groups as if they were free, then as multiples of the
block's own, which its rounding moves; a last least-squares step moves the block's to its groups' codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.weights.gguf.bits import packed_planes
from latentkv.weights.gguf.rounding import (
    inverse,
    ratio,
    squared,
    stored_half,
    symmetric_codes,
    symmetric_error,
    symmetric_scales,
)

_LEVELS = 15
"""Highest code of Q4_K."""

_MULTIPLES = 63
"""Highest multiple of a block's scale or minimum in Q4_K."""

# Codes that the widest weights of a group of Q4_K are spread over: fewer than there are stretch the grid past them.
_SPREADS = (15.0, 14.3, 15.6, 13.6, 16.3, 12.9)
_NEIGHBOURS = (-1, 0, 1)
_ROUNDS = 1


def to_q6_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """Codes of 6 bits in 128 and 64 bytes, 16 scales of 8 bits, and the block's in float16."""
    groups, counted = _grouped(weights, importance, 16)
    free = symmetric_scales(groups, counted, 6, lambda scales: scales)
    _, places = free.abs().max(1, keepdim=True)
    block = stored_half(free.gather(1, places) / -128)
    multiples = (free * inverse(block)).round_().clamp_(-128, 127)
    for _ in range(_ROUNDS):
        multiples = _best_multiples(groups, counted, block, multiples)
        block = _refitted_q6_k(groups, counted, block, multiples)
    codes = (symmetric_codes(groups, block * multiples, 6) + 32).byte().flatten(1)
    low, high = packed_planes(codes & 15, 64, 4), packed_planes(codes >> 4, 32, 2)
    stored = multiples.flatten(1).to(torch.int8).view(torch.uint8)
    return torch.cat((low, high, stored, block.flatten(1).half().view(torch.uint8)), 1)


def _best_multiples(groups: Tensor, counted: Tensor | None, block: Tensor, multiples: Tensor) -> Tensor:
    """Each group's multiple of the block's scale, or a neighbour that serves it better."""
    best, error = multiples, symmetric_error(groups, counted, block * multiples, 6)
    for step in (-1, 1):
        tried = (multiples + step).clamp_(-128, 127)
        found = symmetric_error(groups, counted, block * tried, 6)
        best, error = torch.where(found < error, tried, best), torch.minimum(error, found)
    return best


def _refitted_q6_k(groups: Tensor, counted: Tensor | None, block: Tensor, multiples: Tensor) -> Tensor:
    """The block's scale moved to where its codes want it, where that leaves less error."""
    units = symmetric_codes(groups, block * multiples, 6).mul_(multiples)
    weighted = units if counted is None else units * counted
    over, under = ((weighted * other).sum((1, 2), keepdim=True) for other in (groups, units))
    moved = stored_half(ratio(over, under))
    before, after = (symmetric_error(groups, counted, d * multiples, 6).sum(1, keepdim=True) for d in (block, moved))
    return torch.where(after < before, moved, block)


def to_q4_k(weights: Tensor, importance: Tensor | None) -> Tensor:
    """The block's scale and minimum in float16, 8 multiples of each in 12 bytes, codes of 4 bits in 128 bytes."""
    groups, counted = _grouped(weights, importance, 32)
    scales, minima = _free_q4_k(groups, counted)
    block, low = (stored_half(free.amax(1, keepdim=True) / _MULTIPLES) for free in (scales, minima))
    steps, offsets = (
        (free * inverse(each)).round_().clamp_(0, _MULTIPLES) for free, each in ((scales, block), (minima, low))
    )
    for _ in range(_ROUNDS):
        steps, offsets = _best_pairs(groups, counted, block, low, steps, offsets)
        block, low = _refitted_q4_k(groups, counted, block, low, steps, offsets)
    codes = _codes(groups, block * steps, low * offsets).byte().flatten(1)
    own = torch.cat((block, low), 2).flatten(1).half().view(torch.uint8)
    return torch.cat(
        (own, _six_bits(steps.flatten(1).byte(), offsets.flatten(1).byte()), packed_planes(codes, 32, 4)), 1
    )


def _free_q4_k(groups: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and minimum [B, 8, 1] of each group, of weights = scale * code - minimum, both at least 0."""
    bottom, top = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True)
    width = (top - bottom).clamp_(min=0)
    best = width / _LEVELS, -bottom
    error = _affine_error(groups, counted, *best)
    for spread in _SPREADS:
        codes = _codes(groups, width / spread, -bottom)
        tried = _fitted(groups, counted, codes)
        found = _affine_error(groups, counted, *tried)
        better = found < error
        best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
        error = torch.where(better, found, error)
    return best


def _fitted(groups: Tensor, counted: Tensor | None, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that fit these codes best: a line through them, not below 0 at either."""
    weights = torch.ones_like(groups) if counted is None else counted
    total = weights.sum(-1, keepdim=True)
    x, q = (weights * groups).sum(-1, keepdim=True), (weights * codes).sum(-1, keepdim=True)
    xq, qq = (weights * groups * codes).sum(-1, keepdim=True), (weights * codes * codes).sum(-1, keepdim=True)
    scale = ratio(total * xq - x * q, total * qq - q * q)
    minimum = ratio(scale * q - x, total)
    through_zero = ratio(xq, qq)
    is_above = minimum < 0
    scale, minimum = torch.where(is_above, through_zero, scale), minimum.masked_fill(is_above, 0)
    return scale.clamp_(min=0), minimum


def _best_pairs(
    groups: Tensor, counted: Tensor | None, block: Tensor, low: Tensor, steps: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Each group's multiples, or neighbours of both that serve it better."""
    best = steps, offsets
    error = _affine_error(groups, counted, block * steps, low * offsets)
    for one in _NEIGHBOURS:
        for other in _NEIGHBOURS:
            tried = (steps + one).clamp_(0, _MULTIPLES), (offsets + other).clamp_(0, _MULTIPLES)
            found = _affine_error(groups, counted, block * tried[0], low * tried[1])
            better = found < error
            best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
            error = torch.where(better, found, error)
    return best


def _refitted_q4_k(
    groups: Tensor, counted: Tensor | None, block: Tensor, low: Tensor, steps: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The block's scale and minimum moved to where its codes want them, where that leaves less error."""
    units = _codes(groups, block * steps, low * offsets).mul_(steps)
    below = -offsets.expand_as(groups)
    weights = torch.ones_like(groups) if counted is None else counted

    def product(one: Tensor, other: Tensor) -> Tensor:
        return (weights * one * other).sum((1, 2), keepdim=True)

    uu, ub, bb, xu, xb = (
        product(units, units),
        product(units, below),
        product(below, below),
        product(groups, units),
        product(groups, below),
    )
    determinant = uu * bb - ub * ub
    moved = torch.where(determinant == 0, ratio(xu, uu), ratio(xu * bb - xb * ub, determinant))
    moved_low = ratio(xb * uu - xu * ub, determinant)
    moved, moved_low = stored_half(moved.clamp_(min=0)), stored_half(moved_low.clamp_(min=0))
    before, after = (
        _affine_error(groups, counted, d * steps, m * offsets).sum(1, keepdim=True)
        for d, m in ((block, low), (moved, moved_low))
    )
    return torch.where(after < before, moved, block), torch.where(after < before, moved_low, low)


def _codes(groups: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return ((groups + minima) * inverse(scales)).round_().clamp_(0, _LEVELS)


def _affine_error(groups: Tensor, counted: Tensor | None, scales: Tensor, minima: Tensor) -> Tensor:
    return squared(_codes(groups, scales, minima).mul_(scales).sub_(minima).sub_(groups), counted)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The mirror of `k_blocks._six_bits`: 8 scales and 8 minima of 6 bits in 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return torch.cat((first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)), 1)


def _grouped(weights: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    groups = weights.view(len(weights), -1, size)
    return groups, None if importance is None else importance.view_as(groups)
