"""Tensors between the host and a GPU, through pinned memory; on a CPU nothing moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` of the host on `device`; a GPU fetches them when it gets there, and the host does not wait."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def take_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """values[rows]; the host does not wait for a GPU, as it would with a list for an index."""
    if len(rows) == len(values) and list(rows) == list(range(len(values))):
        return values
    return values.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), values.device))


def to_host(values: Tensor) -> Tensor:
    """`values` on the host, once all that was queued before them on their GPU is done."""
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return host
