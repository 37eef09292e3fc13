"""Packed weights in one file, whose bytes are mapped into memory as kernels read them.

| bytes | what |
|---|---|
| 8 | `LKVPACKD` |
| 8, 8 | where the table begins, and its bytes; little endian |
| 32, 32 | the key that the file was written under; SHA-256 of all before it and of the table |
| from 4096 on | tensors, each from a multiple of 4096 on, zeros between them |
| at the end | the table, JSON: by name each entry's tensors (offset, shape, dtype, checksum) and other fields |

Nothing in a file is believed: the table must have its digest, every tensor must lie inside the file, and an entry is
given only to a reader who names the shape and dtype that it expects. What the key stands for: `models/kept.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from io import BufferedWriter, FileIO
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from latentkv.errors import LatentKVError, OpError
from latentkv.files import map_copy_on_write
from latentkv.json_files import INDEX_BYTES, parse_json
from latentkv.weights.layout import PackedWeight, require_whole

KEY_BYTES = 32

_MAGIC = b"LKVPACKD"
_HEAD = struct.Struct(f"<8sQQ{KEY_BYTES}s32s")
_PAGE = 4096
_CHECKED_BYTES = 128 << 20
"""Up to this size all bytes of a file are compared with their checksums as it is opened: a few milliseconds."""

_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


class DamagedPackedFileError(LatentKVError):
    """A file does not hold what it was written for; it is to be written again."""


class PackedFileWriter:
    """Writes a file, an entry at a time; `finish` makes it one that can be read.

    Args:
        file: empty, open for writing.
        key: what the file is of, `KEY_BYTES` long.
        make_room: called with the size that the file is about to have.
    """

    def __init__(self, file: FileIO, key: bytes, make_room: Callable[[int], None]) -> None:
        self._file, self._key, self._make_room = BufferedWriter(file), key, make_room
        self._size = 0
        self._write(bytes(_PAGE))
        self._table: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: Tensor | PackedWeight) -> None:
        """Write one entry; `name` is new.

        Raises:
            OSError: it cannot be written.
        """
        fields = _fields(value) if isinstance(value, PackedWeight) else {"tensor": value}
        self._table[name] = {field: self._described(content) for field, content in fields.items()}

    def finish(self) -> None:
        """Write the table, then the head that makes the file valid; it is not yet synced.

        Raises:
            OSError: it cannot be written.
        """
        table = json.dumps(self._table).encode()
        head = _HEAD.pack(_MAGIC, self._size, len(table), self._key, bytes(32))[:-32]
        self._write(table)
        self._file.seek(0)
        self._file.write(head + hashlib.sha256(head + table).digest())
        self._file.flush()

    def _described(self, content: Any) -> Any:
        """A field as the table tells of it; a tensor's bytes are written."""
        if isinstance(content, torch.dtype):
            return {"dtype": _name(content)}
        if not isinstance(content, Tensor):
            return content
        data = content.detach().contiguous().flatten().view(torch.uint8)
        told = {
            "offset": self._size,
            "shape": list(content.shape),
            "dtype": _name(content.dtype),
            "sum": _checksum(data),
        }
        self._write(data.numpy().data)
        self._write(bytes(-len(data) % _PAGE))
        return told

    def _write(self, data: bytes | memoryview) -> None:
        self._make_room(self._size + len(data))
        self._file.write(data)
        self._size += len(data)


class PackedFile:
    """A file, mapped: what it gives are views of its pages, which all processes that map it share.

    Nothing is read before it is looked at, and what is written into a view changes this process's copy alone.

    Args:
        file: open for reading; it may be closed afterwards.
        key: what the file must have been written under.

    Attributes:
        nbytes: its size.

    Raises:
        DamagedPackedFileError: it is another file, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, file: FileIO, key: bytes) -> None:
        self.nbytes = file.seek(0, 2)
        self._table = _read_table(file, key, self.nbytes)
        self._memory = torch.frombuffer(map_copy_on_write(file.fileno()), dtype=torch.uint8)
        if self.nbytes <= _CHECKED_BYTES:
            self.check()

    def __contains__(self, name: str) -> bool:
        return name in self._table

    @property
    def names(self) -> Iterator[str]:
        """Of all entries, as they were written."""
        return iter(self._table)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of the expected shape and dtype.

        Raises:
            DamagedPackedFileError: there is none.
        """
        told = self._entry(name)
        tensor = self._tensor(told.get("tensor"))
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise DamagedPackedFileError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype}, not {list(shape)} of {dtype}"
            )
        return tensor

    def packed(self, name: str, shape: Sequence[int]) -> PackedWeight:
        """A packed weight of the expected shape, [O, D] or [E, O, D].

        Raises:
            DamagedPackedFileError: there is none.
        """
        told = self._entry(name)
        kinds = get_type_hints(PackedWeight)
        if set(told) != set(kinds):
            raise DamagedPackedFileError(f"{name} has the fields {sorted(told)}, not {sorted(kinds)}")
        fields = {field: self._content(content) for field, content in told.items()}
        if wrong := [field for field, content in fields.items() if not _is_a(content, kinds[field])]:
            raise DamagedPackedFileError(f"{name} has a {wrong[0]} that is none")
        try:
            weight = PackedWeight(**fields)
            require_whole(weight)
        except OpError as error:
            raise DamagedPackedFileError(f"{name}: {error}") from None
        count, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
        if (weight.count, weight.out_features, weight.in_features) != (count, rows, columns):
            raise DamagedPackedFileError(
                f"{name} is {weight.count} of [{weight.out_features}, {weight.in_features}], not {list(shape)}"
            )
        return weight

    def check(self) -> None:
        """Compare all tensors with their checksums: every byte is read.

        Raises:
            DamagedPackedFileError: one differs.
        """
        for name, told in self._table.items():
            for content in told.values():
                if (
                    _is_tensor(content)
                    and _checksum(self._tensor(content).flatten().view(torch.uint8)) != content["sum"]
                ):
                    raise DamagedPackedFileError(f"{name} has changed since it was written")

    def _entry(self, name: str) -> dict[str, Any]:
        told = self._table.get(name)
        if told is None:
            raise DamagedPackedFileError(f"it has no {name}")
        return told

    def _content(self, content: Any) -> Any:
        if _is_tensor(content):
            return self._tensor(content)
        return _dtype(content.get("dtype")) if isinstance(content, dict) else content

    def _tensor(self, told: Any) -> Tensor:
        if not _is_tensor(told):
            raise DamagedPackedFileError(f"{told!r} is no tensor")
        offset, shape, dtype = told["offset"], told["shape"], _dtype(told["dtype"])
        numbers = [offset, *shape]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or offset % _PAGE:
            raise DamagedPackedFileError(f"no tensor of {shape} lies at {offset}")
        end = offset + math.prod(shape) * dtype.itemsize
        if end > self.nbytes:
            raise DamagedPackedFileError(f"a tensor ends at {end:,} of {self.nbytes:,} bytes")
        return self._memory[offset:end].view(dtype).view(shape)


def _fields(weight: PackedWeight) -> dict[str, Any]:
    return {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}


def _read_table(file: FileIO, key: bytes, size: int) -> dict[str, dict[str, Any]]:
    file.seek(0)
    head = file.read(_HEAD.size)
    if len(head) != _HEAD.size:
        raise DamagedPackedFileError("it ends early")
    magic, start, length, written_under, digest = _HEAD.unpack(head)
    if (magic, written_under) != (_MAGIC, key):
        raise DamagedPackedFileError("it is another file")
    if start + length != size or length > INDEX_BYTES:
        raise DamagedPackedFileError(f"it has {size:,} bytes, not {start + length:,}")
    file.seek(start)
    text = file.read(length)
    if hashlib.sha256(head[:-32] + text).digest() != digest:
        raise DamagedPackedFileError("its table has changed since it was written")
    table = parse_json(text, "its table", DamagedPackedFileError)
    if not isinstance(table, dict) or not all(isinstance(told, dict) for told in table.values()):
        raise DamagedPackedFileError("its table is none")
    return cast("dict[str, dict[str, Any]]", table)


def _checksum(data: Tensor) -> int:
    """A number that changes with any part of [n] uint8, and where parts change places; as fast as memory is read."""
    whole = len(data) // _PAGE * _PAGE
    pages = data[:whole].view(torch.int64).view(-1, _PAGE // 8).sum(dim=1)
    tail = torch.nn.functional.pad(data[whole:], (0, -len(data) % 8)).view(torch.int64).sum()
    odd = torch.arange(1, 2 * len(pages) + 3, 2)
    return int((torch.cat([pages, tail[None]]) * odd).sum())


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that a field is annotated with; a number is none of true and false."""
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    return type(value) is kind or any(_is_a(value, each) for each in get_args(kind))


def _is_tensor(told: Any) -> bool:
    return (
        isinstance(told, dict) and set(told) == {"offset", "shape", "dtype", "sum"} and isinstance(told["shape"], list)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise DamagedPackedFileError(f"{name!r} is no dtype of weights")
    return _DTYPES[name]
