"""One safetensors file, written a tensor at a time: what it will hold is known before the first of them is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.files import write_whole
from latentkv.weights.files.dtypes import NAMES

_ALIGNMENT = 8

Entry = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor that is to be written."""


def entry_bytes(entry: Entry) -> int:
    """Bytes of a tensor in its file."""
    dtype, shape = entry
    return math.prod(shape) * dtype.itemsize


def write_shard(path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file that is there whole or not at all; memory holds one tensor at a time.

    Args:
        path: of the file; it is written beside that under a temporary name, synced and renamed.
        entries: dtype and shape of every tensor that will come.
        tensors: those tensors, each once, in any order.

    Raises:
        CheckpointError: a tensor is not what `entries` says, or does not come.
        OSError: the disk is full or refuses.
    """
    header, starts = _header(entries)
    write_whole(path, lambda temporary: _write(temporary, header, starts, entries, tensors))


def _write(
    path: Path,
    header: bytes,
    starts: Mapping[str, int],
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    missing = set(entries)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            if name not in missing or (tensor.dtype, tuple(tensor.shape)) != entries[name]:
                raise CheckpointError(
                    f"tensor {name} was announced otherwise, or comes twice: {path.name} is not written"
                )
            missing.remove(name)
            if tensor.numel():
                file.seek(len(header) + starts[name])
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if missing:
        raise CheckpointError(f"tensor {min(missing)} was announced and did not come: {path.name} is not written")


def _header(entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor starts after them: widest dtypes first, so that all are aligned."""
    starts: dict[str, int] = {}
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
        dtype, shape = entries[name]
        end = position + entry_bytes(entries[name])
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        starts[name], position = position, end
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded, starts
