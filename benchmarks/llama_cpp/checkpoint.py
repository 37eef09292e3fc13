"""Read bf16 safetensors with numpy alone: a bf16 number is held as its 16 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_DTYPES = {"BF16": np.uint16, "F32": np.float32}


def open_checkpoint(folder: Path) -> Mapping[str, np.ndarray]:
    """Every tensor of a folder by name, mapped from disk: uint16 bits of bf16, or float32."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, _ = entry["data_offsets"]
            tensors[name] = np.memmap(
                file,
                dtype=_DTYPES[entry["dtype"]],
                mode="r",
                offset=8 + header_bytes + first,
                shape=tuple(entry["shape"]),
            )
    return tensors


def as_float32(bits: np.ndarray) -> np.ndarray:
    """The numbers that bf16 bits stand for; float32 is returned as it is."""
    return bits if bits.dtype == np.float32 else (bits.astype(np.uint32) << 16).view(np.float32)
