"""Merging attention over disjoint parts of a context."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import require, require_floats, require_shape
from latentkv.ops.triton import calls as triton


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from attention over each (arXiv 2501.01005, section 2.2).

    Args:
        out_a: [..., D] output over the first set (anything finite where the set is empty).
        lse_a: [...] its log-sum-exp, -inf where the set is empty.
        out_b: like out_a.
        lse_b: like lse_a.

    Returns:
        (out, lse) in float32 (float64 if any part is); where both sets are empty, 0 and -inf.

    Raises:
        OpError: the shapes differ.
    """
    require_floats(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    require_shape("out_b", out_b, tuple(out_a.shape))
    require_shape("lse_b", lse_b, tuple(lse_a.shape))
    require(
        lse_a.shape == out_a.shape[:-1],
        f"merge_states takes out [..., D] with lse [...]; these are {list(out_a.shape)} and {list(lse_a.shape)}",
    )
    fast = triton.merge_states(out_a, lse_a, out_b, lse_b)
    if fast is not None:
        return fast
    double = torch.float64 in (out_a.dtype, out_b.dtype, lse_a.dtype, lse_b.dtype)
    dtype = torch.float64 if double else torch.float32
    out_a, lse_a, out_b, lse_b = (t.to(dtype) for t in (out_a, lse_a, out_b, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    reference = torch.where(torch.isneginf(lse), 0.0, lse)  # exp(-inf - -inf) would be NaN
    weight_a = torch.exp(lse_a - reference).unsqueeze(-1)
    weight_b = torch.exp(lse_b - reference).unsqueeze(-1)
    return out_a * weight_a + out_b * weight_b, lse
