"""Shared argument checks of the ops: one sentence each, raised as `OpError`."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.errors import OpError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What numbers may be computed with."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require(condition: bool, message: str) -> None:
    """Raise `OpError(message)` unless `condition` holds."""
    if not condition:
        raise OpError(message)


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise `OpError` unless `tensor` has this shape; `None` stands for any size."""
    have = tensor.shape
    if len(have) != len(shape) or any(
        want is not None and size != want for size, want in zip(have, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise OpError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}]")


def require_integers(name: str, numbers: Tensor) -> None:
    """Raise `OpError` unless `numbers` can be page numbers, slots or lengths: nothing is rounded to an integer."""
    if numbers.dtype not in _INTEGERS:
        raise OpError(f"{name} must be integers, not {numbers.dtype}")


def row_bounds(q_start: Tensor, rows: int) -> list[int]:
    """Where the rows of ragged sequences begin and end; raises `OpError` unless they rise from 0 to all `rows`."""
    bounds: list[int] = q_start.tolist()
    require(
        bounds[0] == 0 and bounds[-1] == rows and bounds == sorted(bounds),
        f"q_start must rise from 0 to the {rows} rows of q, not {bounds[:8]}",
    )
    return bounds


def require_floats(**numbers: Tensor | None) -> None:
    """Raise `OpError` unless all of these (None: not given) are float32, bf16, fp16 or float64."""
    for name, values in numbers.items():
        if values is not None and values.dtype not in FLOATS:
            raise OpError(f"{name} must be float64, float32, bf16 or fp16, not {values.dtype}")


def require_same_dtype(op: str, **numbers: Tensor | None) -> None:
    """Raise `OpError` unless all of these (None: not given) are of one type; under autocast torch makes them so."""
    given = {name: values for name, values in numbers.items() if values is not None}
    if len({values.dtype for values in given.values()}) == 1:
        return
    if any(torch.is_autocast_enabled(values.device.type) for values in given.values()):
        return
    found = ", ".join(f"{name} is {values.dtype}" for name, values in given.items())
    raise OpError(f"{op} takes tensors of one dtype: {found}; convert with .to(dtype)")


def as_int32(numbers: Tensor) -> Tensor | None:
    """Integers as kernels read them, int32 and the last dimension without gaps; None where one is beyond int32.

    Only other types than int32 are looked through (on a GPU the host then waits for them).
    """
    if numbers.dtype is torch.int32:
        return numbers if numbers.stride(-1) == 1 else numbers.contiguous()
    narrow = numbers.to(torch.int32).contiguous()
    fits = numbers.dtype is not torch.int64 or bool((narrow == numbers).all())
    return narrow if fits else None
