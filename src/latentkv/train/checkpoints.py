"""Checkpoints that a run resumes from exactly: safetensors and JSON, each folder whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentkv.errors import TrainingError
from latentkv.files import sync
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.saved_values import saved_in
from latentkv.train.parts import Parts, save_parts
from latentkv.train.ranks import DataRanks, own_rows

KEEP = 2
PREFIX = "step-"

_REMEDY = "remove its folder to resume from the checkpoint before"


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of training: float32 weights and buffers, optimiser state, and what JSON can hold."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, ranks: DataRanks | None = None) -> Path:
    """Write `folder`/step-<step>; only when all of it is on disk does it get that name and do older ones go.

    Where several processes train together each writes its own rows, into files of its own.
    """
    ranks = ranks or DataRanks()
    temporary, final = folder / f".partial-{step}", folder / f"{PREFIX}{step:08d}"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    ranks.wait()
    if ranks.size == 1:
        save_file(_plain(checkpoint.weights), temporary / "weights.safetensors")
        save_file(_plain(checkpoint.optimizer), temporary / "optimizer.safetensors")
    else:
        save_parts(temporary, "weights", checkpoint.weights, ranks)
        save_parts(temporary, "optimizer", checkpoint.optimizer, ranks)
    ranks.wait()
    if ranks.is_first:
        (temporary / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        sync(folder)
        for old in list_checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    ranks.wait()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        TrainingError: a file is missing or damaged; what the values mean is the caller's to check.
    """
    with saved_in(path, TrainingError, _REMEDY):
        return Checkpoint(
            _load(path, "weights"),
            _load(path, "optimizer"),
            read_json(path / "state.json", TrainingError, most_bytes=INDEX_BYTES, remedy=_REMEDY),
        )


@contextmanager
def newest_checkpoint(
    folder: Path, identity: Mapping[str, str], *, refusal: str, remedy: str
) -> Generator[Checkpoint | None]:
    """The newest checkpoint in a folder, to be put back inside the block; None where there is none.

    Args:
        folder: of the checkpoints.
        identity: values of its state that tell this run from others; they are taken out.
        refusal: the sentence for a checkpoint of another run.
        remedy: what to do about damage that shows inside the block, to end a sentence with.

    Raises:
        TrainingError: the checkpoint is damaged, or another run's.
    """
    found = list_checkpoints(folder)
    if not found:
        yield None
        return
    checkpoint = load_checkpoint(found[-1])
    with saved_in(found[-1], TrainingError, remedy):
        if any(checkpoint.state.pop(name) != value for name, value in identity.items()):
            raise TrainingError(refusal)
        yield checkpoint


@torch.no_grad()
def restore_weights(
    targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, required: Collection[str] | None = None
) -> None:
    """Put saved tensors back.

    Args:
        targets: {name: tensor} to fill.
        saved: of the same names and shapes; of no others.
        required: names that must be there; None: all of `targets`.

    Raises:
        ValueError: one is missing, unknown, or of another shape, named; nothing has been filled then.
    """
    for name in targets if required is None else required:
        if name not in saved:
            raise ValueError(f"tensor {name} is missing")
    for name in saved:
        if name not in targets:
            raise ValueError(f"tensor {name} belongs to another run")
        shape = saved.shape(name) if isinstance(saved, Parts) else saved[name].shape
        if shape != targets[name].shape:
            raise ValueError(f"tensor {name} is {list(shape)}, not {list(targets[name].shape)}")
    for name, tensor in saved.items():
        rows, first = own_rows(targets[name])
        rows.copy_(tensor[first : first + len(rows)] if tensor.ndim else tensor)


def _load(path: Path, kind: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, whichever number of processes has written it."""
    whole = path / f"{kind}.safetensors"
    return load_file(whole) if whole.exists() else Parts(path, kind)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
