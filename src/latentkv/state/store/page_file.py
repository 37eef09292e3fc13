"""One page as a file: a head that says what it must be, the page's bytes layer by layer, a checksum.

| bytes | what |
|---|---|
| 8 | `LATENTKV` |
| 4, 4, 8 | version, token count, bytes of the page's state; little endian, as are all numbers |
| 32 | digest of the page before it, or the root (`page_key`) |
| 4 a token | token ids |
| as said | the page's state, layer by layer: its tokens, then what the layer keeps once a page |
| 4 | CRC-32 of all before it |

A snapshot of recurrent states has such a file too, with the digest of the page at whose end it is and one token id, -1
less the number of tokens that wait beside the state: matrices, convolutions and these tokens, layer by layer.

Whoever reads a file knows all of its head, so nothing in a file is ever interpreted: it is compared.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import FileIO

from latentkv.state.store.page_key import PageKey

VERSION = 2

_HEAD = struct.Struct("<8sIIQ32s")
_CHECKSUM = struct.Struct("<I")


class DamagedPageError(Exception):
    """A file does not hold the page that its name stands for."""


def file_bytes(page_size: int, state_bytes: int) -> int:
    """Size of the file of a page of `page_size` tokens."""
    return _HEAD.size + 4 * page_size + state_bytes + _CHECKSUM.size


def write_page(file: FileIO, key: PageKey, parts: Sequence[memoryview]) -> None:
    """Write a page's state, `parts` one after another, straight from where it lies.

    Raises:
        OSError: it cannot be written.
    """
    checksum = 0
    for part in (_head(key, parts), *parts):
        checksum = zlib.crc32(part, checksum)
        _write_all(file, memoryview(part))
    _write_all(file, memoryview(_CHECKSUM.pack(checksum)))


def read_page(file: FileIO, key: PageKey, parts: Sequence[memoryview]) -> None:
    """Read a page's state straight into `parts`; they hold anything if this fails.

    Raises:
        DamagedPageError: the file is not that of `key`, not whole, or damaged.
        OSError: it cannot be read.
    """
    expected = _head(key, parts)
    head, tail = bytearray(len(expected)), bytearray(_CHECKSUM.size + 1)
    _read_all(file, memoryview(head))
    if bytes(head) != expected:
        raise DamagedPageError("it holds something else")
    checksum = zlib.crc32(head)
    for part in parts:  # its checksum while the processor still has it at hand
        _read_all(file, part)
        checksum = zlib.crc32(part, checksum)
    if file.readinto(tail) != _CHECKSUM.size:
        raise DamagedPageError("its size is wrong")
    if bytes(tail[:-1]) != _CHECKSUM.pack(checksum):
        raise DamagedPageError("its checksum is wrong")


def _head(key: PageKey, parts: Sequence[memoryview]) -> bytes:
    state_bytes = sum(part.nbytes for part in parts)
    return _HEAD.pack(b"LATENTKV", VERSION, len(key.tokens) // 4, state_bytes, key.parent) + key.tokens


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # a disk that is nearly full takes a part


def _read_all(file: FileIO, into: memoryview) -> None:
    while into:
        count = file.readinto(into)
        if not count:
            raise DamagedPageError("it ends early")
        into = into[count:]
