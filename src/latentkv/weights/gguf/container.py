"""`open_gguf`: a model in GGUF, whole or split into several files, read tensor by tensor out of mapped memory."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.files import map_copy_on_write
from latentkv.weights.gguf.header import Header, TensorInfo, Value, read_header

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_LFS_POINTER = b"version https://git-lfs"
_SHORTEST = 24
"""Bytes of a file without keys and tensors."""


class GGUFFile:
    """The metadata and tensors of a model in GGUF; see `open_gguf`.

    Attributes:
        path: of the file, the first one of a split model.
        files: all of them, in order.
        metadata: by key, of the first file.
        tensors: by name, of all files.
    """

    def __init__(self, parts: Mapping[Path, tuple[Header, mmap.mmap]]) -> None:
        self.files: tuple[Path, ...] = tuple(parts)
        self.path = self.files[0]
        self.metadata: Mapping[str, Value] = parts[self.path][0].metadata
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for header, _ in parts.values() for name, info in header.tensors.items()
        }
        self._mapped = {path: torch.frombuffer(data, dtype=torch.uint8) for path, (_, data) in parts.items()}

    def read(self, name: str) -> Tensor:
        """A tensor's bytes where they lie in its mapped file: nothing is read until it is looked at.

        Returns:
            uint8 [rows, row_bytes], a row being all weights along the last axis. Writing to it changes neither the file
            nor what other programs see of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name}: see GGUFFile.tensors for what it has")
        return self._mapped[info.file][info.offset : info.offset + info.nbytes].view(-1, info.row_bytes)


def open_gguf(path: str | Path) -> GGUFFile:
    """A model in GGUF (version 2 or 3, little-endian); only headers are read.

    Args:
        path: of the file, or of any file of a split model (`-00001-of-0000N.gguf`), beside which the others are.

    Raises:
        CheckpointError: a file is missing, damaged, of another kind, or does not belong to the others.
    """
    path = Path(path)
    header, data = _read(path)
    if header.whole_number("split.count", 0) in (0, 1):
        if (named := _PART.fullmatch(path.name)) and int(named[3]) > 1:
            raise CheckpointError(
                f"{path} is named as part {int(named[2])} of {int(named[3])}, but says of itself that it is whole: "
                "give it another name, or download all parts"
            )
        return GGUFFile({path: (header, data)})
    return GGUFFile(_read_parts(path, header, data))


def part_paths(path: Path) -> list[Path]:
    """The files of a model of which this is one, in order, by their names: itself unless it is named as a part."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    return [path.with_name(f"{named[1]}-{number:05}-of-{named[3]}.gguf") for number in range(1, int(named[3]) + 1)]


def _read_parts(path: Path, header: Header, data: mmap.mmap) -> dict[Path, tuple[Header, mmap.mmap]]:
    """All files of a split model, one of which is read already."""
    count = header.whole_number("split.count", 0)
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, which its name does not say: name it NAME-00001-of-0000N.gguf as "
            "it was published, and its other parts likewise"
        )
    paths = part_paths(path)
    if missing := [part.name for part in paths if not os.path.lexists(part)]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path.parent} lacks {missing[0]}{more} of the model's {len(paths)} files: download "
            f"{'them' if more else 'it'}"
        )
    parts: dict[Path, tuple[Header, mmap.mmap]] = {}
    found: dict[str, Path] = {}
    for number, part in enumerate(paths):
        parts[part] = (header, data) if part == path else _read(part)
        _require_part(parts[part][0], number, len(paths))
        for name in parts[part][0].tensors:
            if name in found:
                raise CheckpointError(
                    f"tensor {name[:80]!r} is in {found[name].name} and in {part}: download the model's files again"
                )
            found[name] = part
    expected = parts[paths[0]][0].whole_number("split.tensors.count", len(found))
    if expected != len(found):
        raise CheckpointError(
            f"{paths[0]} says that its {len(paths)} files have {expected:,} tensors, but they have "
            f"{len(found):,}: download them again"
        )
    return parts


def _require_part(header: Header, number: int, count: int) -> None:
    """Raise `CheckpointError` unless a file says that it is this part (from 0), of as many."""
    said = header.whole_number("split.no", 0), header.whole_number("split.count", 0)
    if said != (number, count):
        is_what = "whole" if said[1] in (0, 1) else f"part {said[0] + 1} of {said[1]}"
        raise CheckpointError(
            f"{header.path} says of itself that it is {is_what}, not part {number + 1} of {count}: download it again"
        )


def _read(path: Path) -> tuple[Header, mmap.mmap]:
    data = _map(path)
    return read_header(path, data), data


def _map(path: Path) -> mmap.mmap:
    """A regular file's bytes, mapped.

    Raises:
        CheckpointError: it is missing, something else, too short, or cannot be read.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is no regular file: name the .gguf file itself")
            start = os.read(descriptor, _SHORTEST)
            if start.startswith(_LFS_POINTER):
                raise CheckpointError(
                    f"{path} is a git-LFS pointer, not the file: run `git lfs pull` in its folder, or download it again"
                )
            if len(start) < _SHORTEST:
                raise CheckpointError(f"{path} has only {found.st_size} bytes, too few for GGUF: download it again")
            return map_copy_on_write(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is not there: download the model again, or copy it with "
                "its links followed (`cp -L`)"
            ) from None
        raise CheckpointError(f"there is no file {path}: name an existing one") from None
    except (OSError, ValueError) as reason:  # a name with a null character is a ValueError
        raise CheckpointError(f"{path} cannot be read ({getattr(reason, 'strerror', None) or reason})") from None
