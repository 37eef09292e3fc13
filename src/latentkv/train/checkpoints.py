"""Checkpoints that a run resumes from exactly: safetensors and JSON, each folder whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentkv.errors import TrainingError
from latentkv.files import sync
from latentkv.json_files import INDEX_BYTES, read_json

KEEP = 2
PREFIX = "step-"

REMEDY = "remove its folder to resume from the checkpoint before"


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of training: float32 weights and buffers, optimiser state, and what JSON can hold."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `folder`/step-<step>; only when all of it is on disk does it get that name and do older ones go."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".partial-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(_plain(checkpoint.weights), temporary / "weights.safetensors")
    save_file(_plain(checkpoint.optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    final = folder / f"{PREFIX}{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    sync(folder)
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote."""
    try:
        return Checkpoint(
            load_file(path / "weights.safetensors"),
            load_file(path / "optimizer.safetensors"),
            read_json(path / "state.json", TrainingError, most_bytes=INDEX_BYTES, remedy=REMEDY),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"The training checkpoint {path} cannot be read ({error}): {REMEDY}.") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
