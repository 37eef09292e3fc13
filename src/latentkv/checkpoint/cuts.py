"""`Cut`: which part of a tensor one of several processes has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from latentkv.checks import require
from latentkv.weights import QuantizedWeight
from latentkv.weights.layout import least_group


@dataclass(frozen=True)
class Cut:
    """A part of a tensor that consists of equal pieces along an axis, one behind the other: the same units of each.

    Attributes:
        axis: that is cut, counted from the end.
        begin: the first of the units.
        end: behind the last one.
        units: that each piece has.
        pieces: of the whole tensor: 2 for gates and ups, say.
    """

    axis: int
    begin: int
    end: int
    units: int
    pieces: int = 1

    def of(self, whole: Tensor, axis: int | None = None, *, pieces: int | None = None) -> Tensor:
        """The part of a whole tensor, along another axis or of other pieces where they are given."""
        axis = (self.axis if axis is None else axis) % whole.ndim
        parts = whole.unflatten(axis, (pieces or self.pieces, self.units, -1))
        return parts.narrow(axis + 1, self.begin, self.end - self.begin).flatten(axis, axis + 2)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that a part of this shape is of."""
        axis = self.axis % len(shape)
        size = shape[axis] * self.units // (self.end - self.begin)
        return (*shape[:axis], size, *shape[axis + 1 :])

    def of_stored(self, stored: Tensor, part: Tensor, tensor: Tensor) -> Tensor:
        """Of what a checkpoint has under one name.

        Args:
            stored: whole.
            part: the place of its part, a view of `tensor`; its axes are those of `stored`.
            tensor: the decoder's, of which this cut is.
        """
        axis = next(axis for axis, (own, all_) in enumerate(zip(part.shape, stored.shape, strict=True)) if own != all_)
        return self.of(stored, axis, pieces=self.pieces if part.shape[axis] == tensor.shape[self.axis] else 1)

    def of_quantized(self, whole: QuantizedWeight) -> QuantizedWeight:
        """Of a quantised weight: the same numbers, in groups that no cut goes through.

        Raises:
            OpError: these would be too small for the kernels.
        """
        minima = whole.minima
        if self.axis == -2:
            codes, scales = self.of(whole.codes), self.of(whole.scales)
            return replace(whole, codes=codes, scales=scales, minima=None if minima is None else self.of(minima))
        columns = whole.codes.shape[-1]
        unit = columns // self.units
        begin, end = self.begin * unit, self.end * unit
        codes = whole.codes[..., begin:end]
        if whole.group >= columns:
            return replace(whole, codes=codes, group=end - begin)
        group = math.gcd(whole.group, unit)
        together = least_group(whole.format)
        require(
            group % together == 0,
            f"a weight in {whole.format.name} that is shared out {unit} columns at a time would have groups of "
            f"{group}, and its kernels take multiples of {together}: use fewer ranks",
        )
        groups = slice(begin // group, end // group)

        def spread(shared: Tensor) -> Tensor:
            return shared.repeat_interleave(whole.group // group, dim=-1)[..., groups]

        return replace(
            whole,
            codes=codes,
            scales=spread(whole.scales),
            group=group,
            minima=None if minima is None else spread(minima),
        )
