"""One matrix a head: the absorbed projections of MLA."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.ops.basic import linear
from latentkv.ops.checks import require
from latentkv.ops.packed import PackedWeight


def headwise_linear(x: Tensor, weight: PackedWeight, *, out: Tensor | None = None) -> Tensor:
    """`W_h x_h` for every head h.

    Args:
        x: [T, H, D] bfloat16 or float32; heads and tokens at any distance.
        weight: H packed matrices [O, D].
        out: [T, H, O] to write to, heads and tokens at any distance; None: a new tensor in x's dtype.

    Returns:
        [T, H, O].

    Raises:
        OpError: the shapes do not fit.
    """
    require(
        x.ndim == 3 and x.shape[1] == weight.count and x.shape[2] == weight.in_features,
        f"headwise_linear takes x [T, H, D] and H packed weights [O, D]; these are {list(x.shape)} and "
        f"{weight.count} of [{weight.out_features}, {weight.in_features}]",
    )
    heads = [linear(x[:, head], weight.matrix(head)) for head in range(weight.count)]
    if out is None:
        return torch.stack(heads, dim=1)
    return torch.stack(heads, dim=1, out=out) if out.is_contiguous() else out.copy_(torch.stack(heads, dim=1))
