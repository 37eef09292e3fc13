"""Tensors whose rows lie in files of several processes: safetensors, and a JSON file that says which rows are where.

`weights.json` has an entry for each tensor: its shape, and for each file the row that its part begins with. A run that
is resumed by another number of processes reads the rows that it needs from wherever they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentkv.errors import TrainingError
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.train.ranks import DataRanks, own_rows, rows_of, shared_out


def save_parts(folder: Path, kind: str, tensors: Mapping[str, Tensor], ranks: DataRanks) -> None:
    """Write this process's rows of some tensors; what all have alike is the first one's to write.

    Args:
        folder: where all write.
        kind: what the tensors are, which begins the files' names.
        tensors: of the same names in every process.
        ranks: the processes.
    """
    names = [f"{kind}-{rank + 1:05d}-of-{ranks.size:05d}.safetensors" for rank in range(ranks.size)]
    own: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        files = {names[0]: 0}
        if shared_out(tensor) is not None:
            bounds = [rows_of(tensor.shape[0], rank, ranks.size) for rank in range(ranks.size)]
            files = {file: first for file, (first, last) in zip(names, bounds, strict=True) if first < last}
        if names[ranks.rank] in files:
            own[name] = own_rows(tensor)[0].detach().contiguous()
        index[name] = {"shape": list(tensor.shape), "files": files}
    save_file(own, folder / names[ranks.rank])
    if ranks.is_first:
        (folder / f"{kind}.json").write_text(json.dumps(index), encoding="utf-8")


class Parts(Mapping[str, Tensor]):
    """The tensors that `save_parts` has written, put together one at a time as they are asked for.

    Raises:
        TrainingError: the JSON file cannot be read.
        ValueError: it does not say what it should.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._index: dict[str, tuple[torch.Size, dict[str, int]]] = {}
        for name, entry in read_json(folder / f"{kind}.json", TrainingError, most_bytes=INDEX_BYTES).items():
            shape, files = entry["shape"], entry["files"]
            plain = all(
                type(file) is str and file == Path(file).name and type(row) is int for file, row in files.items()
            )
            if not files or not plain or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"{kind}.json says of {name} what cannot be")
            self._index[name] = torch.Size(shape), files

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, without reading it."""
        return self._index[name][0]

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            ValueError: its parts do not make one.
        """
        shape, files = self._index[name]
        parts: list[Tensor] = []
        for file, first in files.items():
            if first != sum(map(len, parts)):
                raise ValueError(f"rows of {name} are missing before row {first}")
            with safe_open(self._folder / file, framework="pt") as opened:
                parts.append(opened.get_tensor(name))
            if not shape:
                return parts[0]
        found = torch.cat(parts)
        if found.shape != shape:
            raise ValueError(f"tensor {name} is {list(found.shape)}, not {list(shape)}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
