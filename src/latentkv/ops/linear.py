"""Projections."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.checks import FLOATS, require, require_floats, require_same_dtype, require_shape
from latentkv.errors import OpError
from latentkv.kernels import DTYPE_CODES, native_isa
from latentkv.ops.native import linear as native
from latentkv.weights.activations import round_to_int8
from latentkv.weights.layout import PackedWeight, unpack_weight

_NATIVE_X = (torch.bfloat16, torch.float32)

_WIDENED_NUMBERS = 2**21
"""Numbers of the output head that are widened to float32 at a time (8 MiB)."""


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T + bias + residual`: x [..., D], weight [O, D], bias [O], residual [..., O] -> [..., O].

    With a packed weight the sum, the bias and the residual are added in float32 and rounded once. Weights count as what
    was packed, exactly, and x as it is; or, where the weight rounds its input, both as
    `weights.activations.round_to_int8` makes them. A row's result does not depend, bit for bit, on the other rows or
    the number of threads.

    Args:
        x: bfloat16 or float32 for a packed weight, else the weight's dtype.
        weight: a tensor, or one packed matrix.
        bias: any float dtype for a packed weight.
        residual: likewise.
        out_dtype: of the result; None is x's.

    Raises:
        OpError: the shapes do not fit.
    """
    if isinstance(weight, PackedWeight):
        return _packed_linear(x, weight, bias, residual, out_dtype or x.dtype)
    _require_linear(x, weight)
    if x.dtype is not weight.dtype or bias is not None:
        require_same_dtype("linear", x=x, weight=weight, bias=bias)
    out = torch.nn.functional.linear(x, weight, bias)
    if residual is not None:
        _require_residual(residual, x, weight.shape[0])
        require_floats(residual=residual)
        out = out + residual
    return out if out_dtype is None else out.to(out_dtype)


def output_logits(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`x W^T` in float32 from half-precision x and W, for the output head: near-equal tokens stay apart.

    An unpacked W is widened a block of rows at a time, so that the copy stays in the processor's cache.

    Args:
        x: [..., D].
        weight: [V, D], or packed.

    Returns:
        [..., V] float32 (float64 for float64 x).

    Raises:
        OpError: the inner sizes differ.
    """
    require_floats(x=x)
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(weight, PackedWeight):
        return _packed_linear(x, weight, None, None, wide)
    _require_linear(x, weight)
    x = x.to(wide)
    rows = max(1, _WIDENED_NUMBERS // weight.shape[1])
    return torch.cat([torch.nn.functional.linear(x, block.to(wide)) for block in weight.split(rows)], dim=-1)


def _packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out_features = weight.out_features
    if x.shape[-1] != weight.in_features or weight.count != 1:
        raise OpError(
            f"linear takes x [..., D] and one packed weight [O, D]; these are {list(x.shape)} and "
            f"{weight.count} of [{out_features}, {weight.in_features}]"
        )
    if bias is not None:
        require_shape("bias", bias, (out_features,))
    if residual is not None:
        _require_residual(residual, x, out_features)
    isa = native_isa()
    if (
        isa is None
        or x.dtype not in _NATIVE_X
        or out_dtype not in DTYPE_CODES
        or (bias is not None and not _can_add(bias))
        or (residual is not None and not _can_add(residual))
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        require_floats(x=x, bias=bias, residual=residual)
        wide = torch.promote_types(x.dtype, torch.float32)
        if weight.rounds_input:
            x = round_to_int8(x, weight.group)
        out = torch.nn.functional.linear(
            x.to(wide), unpack_weight(weight).to(wide), None if bias is None else bias.to(wide)
        )
        return (out if residual is None else out + residual).to(out_dtype)
    return native.linear(isa, x, weight, bias, residual, out_dtype)


def _can_add(numbers: Tensor) -> bool:
    """Whether the kernels can add these to a product."""
    return numbers.dtype in DTYPE_CODES and numbers.is_cpu


def _require_residual(residual: Tensor, x: Tensor, out_features: int) -> None:
    if residual.shape != (*x.shape[:-1], out_features):
        raise OpError(
            f"residual has shape {list(residual.shape)}; it must be {[*x.shape[:-1], out_features]}, as the result"
        )


def _require_linear(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in FLOATS or x.dtype is not weight.dtype:
        require_floats(x=x, weight=weight)
    require(
        weight.ndim == 2 and x.shape[-1] == weight.shape[1],
        f"linear takes x [..., D] and weight [O, D]; these are {list(x.shape)} and {list(weight.shape)}",
    )
