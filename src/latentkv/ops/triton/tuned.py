"""Block sizes that were measured to be the fastest, by GPU; where none were, the defaults of `blocks`.

`tuned_blocks.json` is `{GPU name: {shape: block sizes}}`; `latentkv bench tune` writes such a file on a GPU.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from latentkv.errors import ConfigError
from latentkv.files import write_json
from latentkv.json_files import read_json
from latentkv.ops.triton.blocks import AttendBlocks, AttendShape, attend_blocks, shared_memory_of

TUNED_FILE = Path(str(files("latentkv.ops.triton"))) / "tuned_blocks.json"
Tuned = dict[str, dict[str, dict[str, int]]]


@cache
def blocks_for(shape: AttendShape, device: torch.device) -> AttendBlocks:
    """Those measured for this shape on this model of GPU, else the default ones.

    Raises:
        OpError: no block fits into the GPU's shared memory.
        ConfigError: the file of measured ones cannot be read.
    """
    if device.type == "cuda":
        measured = read_tuned(TUNED_FILE).get(torch.cuda.get_device_name(device), {}).get(shape_key(shape))
        if measured is not None:
            return AttendBlocks(**measured)
    return attend_blocks(shape, shared_memory_of(device))


def shape_key(shape: AttendShape) -> str:
    """A shape as the file names it, such as "H=128 L=512 R=64 bfloat16 bfloat16": stored and computed in."""
    names = (str(dtype).removeprefix("torch.") for dtype in (shape.stored, shape.compute))
    return f"H={shape.heads} L={shape.latent_dim} R={shape.rope_dim} {' '.join(names)}"


def read_tuned(path: Path) -> Tuned:
    """What a file holds; nothing where there is none.

    Raises:
        ConfigError: it is not such a file.
    """
    if not path.exists():
        return {}
    found = read_json(path, ConfigError, remedy="delete it, or tune anew")
    try:
        for shapes in found.values():
            for sizes in shapes.values():
                AttendBlocks(**sizes)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} does not hold block sizes by GPU and shape ({error}); delete it, or tune anew."
        ) from error
    return found


def save_tuned(path: Path, gpu: str, shape: AttendShape, blocks: AttendBlocks) -> None:
    """Add one entry to a file, or replace it.

    Raises:
        ConfigError: the file is there, but is no such file.
    """
    tuned = read_tuned(path)
    tuned.setdefault(gpu, {})[shape_key(shape)] = asdict(blocks)
    write_json(path, tuned)
