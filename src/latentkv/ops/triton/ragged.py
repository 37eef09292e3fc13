"""Tiles of ragged rows, found by their number alone: no list of tiles is made, and no length is read on the host."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owner(bounds, count, value):
    """The b with bounds[b] <= value < bounds[b + 1], of `count` runs, some of them empty."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(bounds + middle) <= value:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def tile_of(bounds, count, tile, BLOCK: tl.constexpr):
    """The run b that tile number `tile` of BLOCK rows belongs to, and its first row, counted from the run's first.

    Run b is given the tiles from bounds[b] // BLOCK + b on, which are never too few; the last may have no rows.
    """
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(bounds + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low, (tile - tl.load(bounds + low) // BLOCK - low) * BLOCK


def most_tiles(rows: int, runs: int, block: int) -> int:
    """How many numbers of tiles there are for so many rows in so many runs."""
    return rows // block + runs
