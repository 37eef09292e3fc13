"""Write a checkpoint folder that any safetensors reader loads, so that a failure leaves what was there before."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latentkv.checkpoint.locate import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from latentkv.errors import CheckpointError
from latentkv.files import sync

MAX_SHARD_BYTES = 4 * 10**9

_STAGING = ".saving"
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: Mapping[str, Mapping[str, Any] | bytes] | None = None,
) -> None:
    """Save tensors and config as `model.safetensors`, or as shards with an index, and `config.json`.

    Everything is written and synced in a folder of its own; only then is it renamed into place, `config.json` last.
    Tensors are consumed as they come: memory holds about one shard of them.

    Args:
        folder: made if need be. Weights of an earlier checkpoint in it are replaced.
        tensors: (name, tensor) pairs, any device; each name once.
        config: content of config.json.
        max_shard_bytes: a shard holds no more, unless a single tensor does.
        files: further files by name: JSON objects, or raw bytes.

    Raises:
        CheckpointError: the disk is full or refuses (the folder's earlier checkpoint is then whole), there are no
            tensors, or a name comes twice.
    """
    folder = Path(folder)
    staging = folder / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left over from a process that was killed
        staging.mkdir(parents=True)
        _write_weights(staging, tensors, max_shard_bytes)
        for name, content in {**(files or {}), CONFIG_FILE: config}.items():
            _write_synced(staging / name, content if isinstance(content, bytes) else _as_json(content))
        _publish(staging, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint could not be saved in {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(staging: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[Path] = []
    number_of: dict[str, int] = {}
    total_bytes = 0
    for shard in _shards(tensors, max_shard_bytes):
        if repeated := number_of.keys() & shard.keys():
            raise CheckpointError(f"tensor {min(repeated)} was to be saved twice: give each name once")
        number_of.update(dict.fromkeys(shard, len(shards)))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shards.append(staging / f"{len(shards)}.safetensors")
        shards[-1].touch()
        mode = shards[-1].stat().st_mode
        save_file(shard, shards[-1], metadata={"format": "pt"})
        shards[-1].chmod(mode)  # safetensors lets nobody but the owner read its files
        sync(shards[-1])
    if not shards:
        raise CheckpointError("a checkpoint without tensors cannot be saved: give at least one")
    if len(shards) == 1:
        shards[0].rename(staging / SINGLE_FILE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(staging / name)
    weight_map = {name: names[number] for name, number in sorted(number_of.items())}
    _write_synced(staging / INDEX_FILE, _as_json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}))


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Runs of tensors of at most `max_bytes`."""
    shard: dict[str, Tensor] = {}
    memories: set[int] = set()
    size = 0
    for name, tensor in tensors:
        if name in shard:
            raise CheckpointError(f"tensor {name} was to be saved twice: give each name once")
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, memories, size = {}, set(), 0
        shard[name] = _own_memory(tensor, memories)
        memories.add(shard[name].untyped_storage().data_ptr())
        size += tensor.nbytes
    if shard:
        yield shard


def _own_memory(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor on the CPU in memory of its own: safetensors refuses views, such as one of many fused experts."""
    tensor = tensor.detach().to("cpu").contiguous()
    memory = tensor.untyped_storage()
    return tensor if memory.nbytes() == tensor.nbytes and memory.data_ptr() not in taken else tensor.clone()


def _publish(staging: Path, folder: Path) -> None:
    """Rename everything into place, in an order in which no reader ever mixes old weights with new ones."""
    new = {path.name for path in staging.iterdir()}
    weights = sorted(name for name in new if _OWN_WEIGHTS.fullmatch(name))
    (folder / INDEX_FILE).unlink(missing_ok=True)  # without an index nobody reads shards, old or new
    for name in [*weights, *sorted(new & {INDEX_FILE})]:
        (staging / name).replace(folder / name)
    for path in folder.iterdir():
        if _OWN_WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
    for name in sorted(new - {*weights, INDEX_FILE, CONFIG_FILE}):
        (staging / name).replace(folder / name)
    (staging / CONFIG_FILE).replace(folder / CONFIG_FILE)
    if os.name == "posix":
        sync(folder)


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
