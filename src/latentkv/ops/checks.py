"""Shared argument checks of the ops: one sentence each, raised as `OpError`."""

from __future__ import annotations

from torch import Tensor

from latentkv.errors import OpError


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
