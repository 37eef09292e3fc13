"""Each head's own projection: W_UK and W_UV of absorbed attention."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import require_floats
from latentkv.errors import OpError
from latentkv.ops.linear import linear
from latentkv.ops.native import headwise as native
from latentkv.weights.layout import PackedWeight


def headwise_linear(x: Tensor, weight: PackedWeight, *, out: Tensor | None = None) -> Tensor:
    """`out[t, h] = W_h x[t, h]` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2: the absorbed W_UK and W_UV).

    Summed in float32 and rounded once. A token's result does not depend, bit for bit, on the other tokens or the number
    of threads.

    Args:
        x: [T, H, D] bfloat16 or float32; may be a slice of a wider tensor.
        weight: H packed matrices [O, D].
        out: [T, H, O] in any float dtype, may be a slice of a wider tensor; None = a new tensor of x's dtype.

    Returns:
        out.

    Raises:
        OpError: the shapes do not fit.
    """
    if x.ndim != 3 or x.shape[1] != weight.count or x.shape[2] != weight.in_features:
        raise OpError(
            f"headwise_linear takes x [T, H, D] and H packed weights [O, D]; these are {list(x.shape)} and "
            f"{weight.count} of [{weight.out_features}, {weight.in_features}]"
        )
    if out is not None and out.shape != (x.shape[0], weight.count, weight.out_features):
        raise OpError(f"out must be {[x.shape[0], weight.count, weight.out_features]}, not {list(out.shape)}")
    fast = native.headwise_linear(x, weight, out)
    if fast is not None:
        return fast
    require_floats(x=x, out=out)
    result = torch.stack([linear(x[:, head], weight.matrix(head)) for head in range(weight.count)], dim=1)
    return result if out is None else out.copy_(result)
