"""Which file of a checkpoint folder holds which tensor, from its index or its one file; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from latentkv.checkpoint.layouts import describe_folder, refuse_missing
from latentkv.errors import CheckpointError
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.libraries import errors_as

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


def holds_weights(folder: Path) -> bool:
    """Whether a folder has files that `locate_tensors` reads."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def locate_tensors(folder: Path) -> dict[str, str]:
    """The file of every tensor, from the index or from the one file.

    Raises:
        CheckpointError: there are no safetensors (the sentence says what there is), or the index cannot be followed.
    """
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(open_file(folder / SINGLE_FILE).keys(), SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(describe_folder(folder))
    weight_map = read_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map: download it again")
    shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    for name, shard in shard_of.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} places {name} outside its folder, in {shard}: not read")
    _refuse_missing_shards(folder, shard_of)
    return shard_of


def _refuse_missing_shards(folder: Path, shard_of: Mapping[str, str]) -> None:
    missing = [shard for shard in sorted(set(shard_of.values())) if not (folder / shard).is_file()]
    if not missing:
        return
    refuse_missing(folder / missing[0])
    name = next(name for name, shard in shard_of.items() if shard == missing[0])
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    it = "them" if more else "it"
    raise CheckpointError(
        f"{folder} lacks the shard {missing[0]} that its index names (for {name}){more}: download {it}"
    )


def open_file(path: Path) -> Any:
    """A safetensors file, mapped.

    Raises:
        CheckpointError: it cannot be read.
    """
    refuse_missing(path)
    with errors_as(CheckpointError, f"{path} is truncated or not a safetensors file"):
        return safe_open(path, framework="pt")


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    refuse_missing(path)
    return read_json(path, CheckpointError, most_bytes=INDEX_BYTES, remedy="download it again")
