"""Weights as integers with a scale for every group of inputs: what they stand for, and how they are chosen.

Files of others may have a minimum for every group, too, and codes of other widths. Such weights are kept, not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.checks import require
from latentkv.weights.formats import INT8, ROUNDED_TO, CodeFormat

GROUP_SIZES = (32, 64, 128)

_SCALES = (torch.bfloat16, torch.float16, torch.float32)

# Scales that are tried after plain rounding's max|w| / 127 or max|w| / 7. int8: a few steps of bfloat16 less; more
# clipping never pays. int4: parts of max|w| / 8, of the sign that takes the largest weight to the code -8; then to both
# sides of the best so far. On normal and on heavy-tailed weights, ten times as many scales or least-squares steps
# after these gain less than 2 % more.
_SHRINK_INT8 = (0.996, 0.992, 0.988, 0.984)
_SHRINK_INT4 = (1.0, 0.88, 0.76, 0.64)
_STEPS_INT4 = (0.06, 0.03)
_CHUNK = 2**19  # weights at a time: the temporaries stay in the processor's cache


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix, or stacked ones, as codes with scales: weight[o, d] = v(codes[o, d]) * scales[o, g] + minima[o, g].

    v is what a code stands for in this format, of most of them its own number; g = d // group.

    Attributes:
        codes: [..., O, D] int8, of those that the format has.
        scales: [..., O, ceil(D / group)] bfloat16, float16 or float32; any sign.
        format: of the codes.
        group: inputs that share a scale (the last group may be short); D where a whole row does.
        minima: what is added to all weights of a group, of the scales' shape and dtype, where the format has such.
    """

    codes: Tensor
    scales: Tensor
    format: CodeFormat
    group: int
    minima: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes when packed: codes at their width, scales and minima as they are."""
        shared = self.scales.nbytes * (1 if self.minima is None else 2)
        return (self.codes.numel() * self.format.bits + 7) // 8 + shared

    def is_like(self, other: QuantizedWeight) -> bool:
        """Whether rows of both can be rows of one weight."""
        return (self.format, self.group, self.scales.dtype) == (other.format, other.group, other.scales.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that codes and scales stand for, [..., O, D]: exact in float32, rounded once in another dtype."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        rows, targets = self.codes.flatten(0, -2), weight.flatten(0, -2)
        scales = self.scales.flatten(0, -2).float()
        minima = None if self.minima is None else self.minima.flatten(0, -2).float()
        for block in _row_blocks(*rows.shape):
            spread = scales[block].repeat_interleave(self.group, dim=1)[:, : rows.shape[1]]
            spread.mul_(self.format.values(rows[block]))
            if minima is not None:
                spread += minima[block].repeat_interleave(self.group, dim=1)[:, : rows.shape[1]]
            targets[block] = spread
        return weight


def quantize_weight(
    weight: Tensor, fmt: CodeFormat | str, group: int | None = None, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight to integers, every group with the scale that leaves the least squared error of those tried.

    Symmetric; a scale is rounded to bfloat16 before its codes are chosen. Plain rounding (max|w| / 127 or max|w| / 7)
    is among what is tried, so no group's error is larger than that.

    Args:
        weight: [..., O, D], any float dtype, finite.
        fmt: one of `formats.ROUNDED_TO`, or its name.
        group: inputs that share a scale: 32, 64 or 128; None is the format's own default.
        importance: what each column's squared error counts, at least 0: [D], or [E, D] for a weight [E, O, D]; None:
            all the same.

    Raises:
        OpError: unknown format or group; the weight is no floating-point matrix, or holds NaN or infinity; the
            importance does not fit it.
    """
    form = fmt if isinstance(fmt, CodeFormat) else require_format(fmt, group)
    _require_importance(weight, importance)
    require(
        weight.ndim >= 2 and weight.is_floating_point() and weight.numel() > 0,
        f"quantize_weight takes a floating-point weight [..., O, D], not {list(weight.shape)} of {weight.dtype}",
    )
    group = group or form.default_group or weight.shape[-1]
    rows = weight.detach().reshape(-1, weight.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(rows), -(-rows.shape[1] // group), dtype=torch.bfloat16, device=weight.device)
    factors = None if importance is None else importance.float().sqrt().view(-1, 1, rows.shape[1])
    for block in _row_blocks(*rows.shape):
        grouped = _grouped(rows[block], group)
        counted = None if factors is None else _grouped(_rows_of(factors, len(rows), block), group)
        scales[block] = _best_scales(grouped, form, counted)
        codes[block] = _round_to_codes(grouped, scales[block], form).flatten(1)[:, : rows.shape[1]]
    require(bool(torch.isfinite(scales).all()), "quantize_weight was given a weight with NaN or infinite values")
    return QuantizedWeight(codes.view(weight.shape), scales.view(*weight.shape[:-1], -1), form, group)


def _require_importance(weight: Tensor, importance: Tensor | None) -> None:
    allowed = [weight.shape[-1:]] + ([weight.shape[::2]] if weight.ndim == 3 else [])
    require(
        importance is None or importance.shape in allowed,
        f"the importance of columns of {list(weight.shape)} is {' or '.join(str(list(shape)) for shape in allowed)}",
    )


def _grouped(rows: Tensor, group: int) -> Tensor:
    """[rows, D] -> float32 [rows, groups, group], the last padded with zeros."""
    return torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % group)).unflatten(1, (-1, group))


def _rows_of(factors: Tensor, num_rows: int, block: slice) -> Tensor:
    """The factors [1 or E, 1, D] of some rows of a weight of so many, [rows, D]."""
    places = torch.arange(block.start, min(block.stop, num_rows)) // (num_rows // len(factors))
    return factors[places, 0]


def require_quantized(weight: QuantizedWeight) -> None:
    """Raise `OpError` unless codes and scales fit together and are of the types that `QuantizedWeight` names."""
    codes, scales, minima = weight.codes, weight.scales, weight.minima
    require(
        codes.dtype == torch.int8 and scales.dtype in _SCALES,
        f"a quantised weight has int8 codes and bfloat16, float16 or float32 scales, not {codes.dtype} and "
        f"{scales.dtype}",
    )
    require(weight.group >= 1, f"weights cannot share a scale in groups of {weight.group}")
    require(
        weight.format.has_minima == (minima is not None),
        f"{weight.format.name} weights have {'' if weight.format.has_minima else 'no '}minima",
    )
    if minima is not None:
        require(
            minima.shape == scales.shape and minima.dtype == scales.dtype,
            f"minima are like scales, {list(scales.shape)} of {scales.dtype}, not {list(minima.shape)} of "
            f"{minima.dtype}",
        )
    groups = -(-codes.shape[-1] // weight.group)
    require(
        tuple(scales.shape) == (*codes.shape[:-1], groups),
        f"codes {list(codes.shape)} in groups of {weight.group} take scales {[*codes.shape[:-1], groups]}, "
        f"not {list(scales.shape)}",
    )
    if codes.numel() and weight.format.bits < 8:
        lowest, highest = weight.format.lowest, weight.format.highest
        least, most = map(int, codes.aminmax())
        require(
            lowest <= least and most <= highest,
            f"{weight.format.name} codes are {lowest} to {highest}, not {least} to {most}",
        )


def require_format(fmt: str, group: int | None) -> CodeFormat:
    """The format of that name that weights can be rounded to.

    Raises:
        OpError: there is none, or no such group.
    """
    require(fmt in ROUNDED_TO, f"unknown weight format {fmt!r}; choose one of {', '.join(ROUNDED_TO)}")
    require(
        group is None or group in GROUP_SIZES, f"weights cannot share scales in groups of {group}; take 32, 64 or 128"
    )
    return ROUNDED_TO[fmt]


def _best_scales(weight: Tensor, form: CodeFormat, counted: Tensor | None) -> Tensor:
    """[rows, groups] bfloat16 for `weight` [rows, groups, g] float32; NaN or infinite where the weight is.

    `counted` [rows, groups, g] is what each error is multiplied by before it is squared.
    """
    top, bottom = _largest(weight), _largest(-weight)
    widest = torch.maximum(top, bottom)
    plain = (widest / form.highest).bfloat16()
    best = plain, _error(weight, plain, form, counted)
    if form is INT8:
        for shrink in _SHRINK_INT8:
            best = _better(weight, form, best, plain * shrink, counted)
        return best[0]
    toward = torch.where(top >= bottom, -widest, widest) / -form.lowest
    for shrink in _SHRINK_INT4:
        best = _better(weight, form, best, toward * shrink, counted)
    for step in _STEPS_INT4:
        for scale in (best[0] + toward * step, best[0] - toward * step):
            best = _better(weight, form, best, scale, counted)
    return best[0]


def _better(
    weight: Tensor, form: CodeFormat, best: tuple[Tensor, Tensor], scale: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and errors of `best`, replaced for the groups that `scale`, rounded to bfloat16, serves better."""
    scale = scale.bfloat16()
    error = _error(weight, scale, form, counted)
    better = error < best[1]
    return torch.where(better, scale, best[0]), torch.where(better, error, best[1])


def _error(weight: Tensor, scale: Tensor, form: CodeFormat, counted: Tensor | None) -> Tensor:
    """[rows, groups] square root of each group's summed squared error."""
    codes = _round_to_codes(weight, scale, form)
    errors = torch.addcmul(weight, codes, scale.float()[..., None], value=-1, out=codes)
    return torch.linalg.vector_norm(errors if counted is None else errors.mul_(counted), dim=-1)


def _round_to_codes(weight: Tensor, scale: Tensor, form: CodeFormat) -> Tensor:
    """[rows, groups, g] float32 integers."""
    inverse = scale.float().reciprocal()
    inverse.masked_fill_(inverse.isinf(), 0.0)  # a group of zeros, or of numbers too small to have a scale
    return (weight * inverse[..., None]).round_().clamp_(max(form.lowest, -127), form.highest)


def _largest(weight: Tensor) -> Tensor:
    """Maximum of the last axis, NaN if there is one; by halves, many times faster than torch's own amax on a CPU."""
    while (size := weight.shape[-1]) > 1:
        half = (size + 1) // 2
        weight = torch.maximum(weight[..., :half], weight[..., size - half :])
    return weight[..., 0]


def _row_blocks(num_rows: int, row_size: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, row_size))
    return [slice(start, start + step) for start in range(0, num_rows, step)]
