"""A GGUF file's header: its metadata and where its tensors lie, every count and place checked before it is used."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from latentkv.errors import CheckpointError
from latentkv.weights.gguf.types import TYPES, TensorType, describe_unread, readable_names

Value = bool | int | float | str | list[str] | NDArray[Any]
"""What a key of the metadata may hold; arrays of numbers are numpy's, of one axis."""

HEADER_BYTES = 128 << 20
"""Size limit of all that comes before the tensors' data, in bytes: several times the largest vocabulary's."""

_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 18  # a thousand times, and three times, what the largest files have

_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_NAME_BYTES = 65_535
_KEY, _TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of the shortest there can be

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, np.dtype[Any]] = {
    number: np.dtype(name).newbyteorder("<")
    for number, name in (
        *((0, "u1"), (1, "i1"), (2, "u2"), (3, "i2"), (4, "u4"), (5, "i4"), (6, "f4")),
        *((_BOOL, "u1"), (10, "u8"), (11, "i8"), (12, "f8")),
    )
}
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: as the file has it.
        shape: in torch's order, the contiguous axis last.
        type: how its numbers are stored.
        file: that holds it.
        offset: of its first byte in that file.
        nbytes: that it takes there.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    file: Path
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of all weights along the last axis."""
        return (self.shape[-1] if self.shape else 1) // self.type.weights * self.type.nbytes


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors' data.

    Attributes:
        path: of the file.
        metadata: by key.
        tensors: by name, in the file's order.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]

    def whole_number(self, key: str, default: int) -> int:
        """A key's value; `default` where there is none.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.path} is damaged (its {key} is no whole number): download it again")
        return value


def read_header(path: Path, data: mmap.mmap) -> Header:
    """The header of a mapped file.

    Raises:
        CheckpointError: it is no GGUF file of version 2 or 3, little-endian, or what it says cannot be.
    """
    return _HeaderReader(path, data).read()


class _HeaderReader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._end = min(self._size, HEADER_BYTES)
        self._at = 0

    def read(self) -> Header:
        self._check_kind()
        tensors = self._count("tensors", _TENSOR, _MOST_TENSORS)
        keys = self._count("keys", _KEY, _MOST_KEYS)
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._text("a key", _NAME_BYTES)
            if key in metadata:
                self._refuse(f"the key {key[:80]!r} comes twice")
            metadata[key] = self._value(key)
        entries: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
        for _ in range(tensors):
            name = self._text("a tensor's name", _NAME_BYTES)
            if name in entries:
                self._refuse(f"tensor {name[:80]!r} comes twice")
            entries[name] = self._entry(name)
        header = Header(self._path, metadata, {})
        header.tensors.update(self._placed(entries, self._alignment(header)))
        return header

    def _check_kind(self) -> None:
        magic = self._data[:4]
        if magic in _OLD_MAGICS:
            raise CheckpointError(f"{self._path} has a format that GGUF replaced in 2023: use the model's GGUF file")
        if magic == b"FUGG":
            self._refuse_big_endian()
        if magic != b"GGUF":
            raise CheckpointError(
                f"{self._path} is no GGUF file (it begins with {magic!r}): download it again, or name another"
            )
        self._at = 4
        version = self._number(_U32, "its version")
        if version and not version & 0xFFFF:
            self._refuse_big_endian()
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path} is GGUF of version {version}, and 2 and 3 are read: convert the model anew with today's "
                "llama.cpp"
            )

    def _refuse_big_endian(self) -> NoReturn:
        raise CheckpointError(
            f"{self._path} is a big-endian GGUF file, and little-endian ones are read: download that, or convert it "
            "(`gguf-convert-endian`, of the package gguf)"
        )

    def _count(self, what: str, least_bytes: int, most: int) -> int:
        count = self._number(_U64, f"the number of its {what}")
        if count > (self._end - self._at) // least_bytes:
            self._refuse(f"it counts {count:,} {what}, more than fit in its {self._size:,} bytes")
        if count > most:
            self._refuse(f"it counts {count:,} {what}, more than the {most:,} that it may")
        return count

    def _number(self, format: struct.Struct, what: str) -> int:
        at = self._advance(format.size, what)
        return format.unpack_from(self._data, at)[0]

    def _advance(self, nbytes: int, what: str) -> int:
        """Go past `nbytes`, which must be there; where they start."""
        at = self._at
        if nbytes > self._end - at:
            if self._size > HEADER_BYTES and nbytes <= self._size - at:
                self._refuse(f"its header has more than the {HEADER_BYTES:,} bytes that it may")
            self._refuse(f"it ends inside {what}")
        self._at = at + nbytes
        return at

    def _text(self, what: str, most_bytes: int = HEADER_BYTES) -> str:
        length = self._number(_U64, what)
        if length > most_bytes:
            self._refuse(f"{what} has {length:,} bytes, more than the {most_bytes:,} that it may")
        at = self._advance(length, what)
        try:
            return self._data[at : at + length].decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is no UTF-8")

    def _value(self, key: str) -> Value:
        what = f"the value of {key[:80]!r}"
        kind = self._number(_U32, what)
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY:
            return self._numbers(kind, 1, what)[0].item()
        kind = self._number(_U32, what)
        count = self._number(_U64, what)
        if kind == _STRING:
            return self._texts(count, what)
        if kind == _ARRAY:
            self._refuse(f"{what} is an array of arrays")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            self._refuse(f"{what} is of type {kind}, which is not known")
        at = self._advance(count * dtype.itemsize, what)
        values = np.frombuffer(self._data, dtype, count, at).copy()  # which outlives the mapping
        if kind != _BOOL:
            return values
        if (values > 1).any():
            self._refuse(f"{what} is neither true nor false")
        return values.astype(np.bool_)

    def _texts(self, count: int, what: str) -> list[str]:
        if count > (self._end - self._at) // _U64.size:
            self._refuse(f"{what} is {count:,} texts, more than fit in its {self._size:,} bytes")
        # A vocabulary has hundreds of thousands: this loop is `_text` without its calls.
        texts: list[str] = []
        data, end, at, length_at = self._data, self._end, self._at, _U64.unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > end:
                    break
                texts.append(data[start:at].decode())
        except struct.error:
            at = end + 1
        except UnicodeDecodeError:
            self._refuse(f"{what} is no UTF-8")
        self._advance(at - self._at, what)
        return texts

    def _entry(self, name: str) -> tuple[tuple[int, ...], TensorType, int]:
        """A tensor's shape, type and offset after the header's end."""
        tensor = f"tensor {name[:80]!r}"
        axes = self._number(_U32, tensor)
        if axes > _DIMENSIONS:
            self._refuse(f"{tensor} has {axes:,} axes, more than the {_DIMENSIONS} that it may")
        shape = tuple(self._number(_U64, tensor) for _ in range(axes))[::-1]
        number, offset = self._number(_U32, tensor), self._number(_U64, tensor)
        if 0 in shape:
            self._refuse(f"{tensor} of shape {list(shape)} holds nothing")
        kind = TYPES.get(number)
        if kind is None:
            raise CheckpointError(
                f"{self._path} stores {tensor} as {describe_unread(number)}: use a file whose weights are "
                f"{readable_names()}"
            )
        if (shape[-1] if shape else 1) % kind.weights:
            self._refuse(f"{tensor} of shape {list(shape)} has rows that {kind.name}'s {kind.weights} does not divide")
        return shape, kind, offset

    def _alignment(self, header: Header) -> int:
        alignment = header.whole_number("general.alignment", _DEFAULT_ALIGNMENT)
        if alignment < 8 or alignment & (alignment - 1):
            self._refuse(f"its general.alignment is {alignment}, no power of two from 8 up")
        return alignment

    def _placed(
        self, entries: Mapping[str, tuple[tuple[int, ...], TensorType, int]], alignment: int
    ) -> dict[str, TensorInfo]:
        """Tensors with their places in the file, which no two of them share."""
        first = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, (shape, kind, offset) in entries.items():
            if offset % alignment:
                self._refuse(f"tensor {name[:80]!r} starts at {offset:,}, no multiple of {alignment}")
            nbytes = math.prod(shape) // kind.weights * kind.nbytes
            missing = first + offset + nbytes - self._size
            if missing > 0:
                self._refuse(f"tensor {name[:80]!r} ends {missing:,} bytes past its end")
            tensors[name] = TensorInfo(name, shape, kind, self._path, first + offset, nbytes)
        end, before = first, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                self._refuse(f"tensors {before[:80]!r} and {info.name[:80]!r} share bytes")
            end, before = info.offset + info.nbytes, info.name
        return tensors

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is damaged ({what}): download it again")
