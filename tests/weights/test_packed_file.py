"""What a file of packed weights gives back, and that a damaged one gives nothing."""

from __future__ import annotations

import hashlib
import json
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from latentkv.weights import PackedWeight, pack_weight, quantize_weight
from latentkv.weights.formats import INT4, INT8
from latentkv.weights.layout import unpack_weight
from latentkv.weights.packed_file import DamagedPackedFileError, PackedFile, PackedFileWriter

KEY = bytes(range(32))
HEAD = struct.Struct("<8sQQ32s32s")


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


PACKED = {
    "bf16": pack_weight(matrix(40, 24)),
    "compact": pack_weight(matrix(64, 512).bfloat16(), compact=True),
    "int8": pack_weight(quantize_weight(matrix(3, 40, 64), INT8)),
    "int4": pack_weight(quantize_weight(matrix(33, 256), INT4)),
}
PLAIN = {
    "norm": matrix(7).bfloat16(),
    "bias": matrix(12),
    "ids": torch.arange(5, dtype=torch.int64),
    "none": torch.empty(0, 3),
}


def write(path: Path, entries: dict[str, Any], key: bytes = KEY) -> Path:
    with FileIO(str(path), "x") as file:
        writer = PackedFileWriter(file, key, lambda size: None)
        for name, value in entries.items():
            writer.add(name, value)
        writer.finish()
    return path


def read(path: Path, key: bytes = KEY) -> PackedFile:
    with FileIO(str(path)) as file:
        return PackedFile(file, key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "file", PACKED | PLAIN)


def shape_of(weight: PackedWeight) -> tuple[int, ...]:
    return weight.count, weight.out_features, weight.in_features


def rewrite_table(path: Path, change: Any) -> None:
    """Another table with a head that fits it, as somebody would write who means harm."""
    content = path.read_bytes()
    magic, start, length, key, _ = HEAD.unpack(content[: HEAD.size])
    table = json.loads(content[start : start + length])
    text = json.dumps(change(table) or table).encode()
    head = HEAD.pack(magic, start, len(text), key, bytes(32))[:-32]
    head += hashlib.sha256(head + text).digest()
    path.write_bytes(head + content[len(head) : start] + text)


def test_a_file_gives_back_every_weight_bit_for_bit_where_kernels_can_read_it(path: Path) -> None:
    file = read(path)
    assert list(file.names) == [*PACKED, *PLAIN]
    for name, weight in PACKED.items():
        found = file.packed(name, shape_of(weight))
        assert torch.equal(found.data, weight.data)
        assert found.data.data_ptr() % 4096 == 0
        assert torch.equal(unpack_weight(found), unpack_weight(weight))
        assert (found.format, found.group, found.scales) == (weight.format, weight.group, weight.scales)
    for name, tensor in PLAIN.items():
        assert torch.equal(file.tensor(name, tensor.shape, tensor.dtype), tensor)


def test_what_is_written_into_a_view_stays_in_the_process(path: Path) -> None:
    before = path.read_bytes()
    read(path).tensor("bias", (12,), torch.float32).zero_()
    assert path.read_bytes() == before
    assert torch.equal(read(path).tensor("bias", (12,), torch.float32), PLAIN["bias"])


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("norm", (8,), torch.bfloat16), ("norm", (7,), torch.float16), ("nothing", (7,), torch.bfloat16)],
)
def test_another_shape_or_dtype_than_expected_is_refused(path: Path, name: str, shape: Any, dtype: Any) -> None:
    with pytest.raises(DamagedPackedFileError, match=name):
        read(path).tensor(name, shape, dtype)


@pytest.mark.parametrize("shape", [(40, 25), (41, 24), (2, 40, 24)])
def test_a_packed_weight_of_another_shape_is_refused(path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DamagedPackedFileError, match="bf16"):
        read(path).packed("bf16", shape)


@pytest.mark.parametrize("name", list(PACKED))
def test_one_name_cannot_stand_for_the_other_kind_of_entry(path: Path, name: str) -> None:
    with pytest.raises(DamagedPackedFileError, match="fields"):
        read(path).packed("norm", (1, 7))
    with pytest.raises(DamagedPackedFileError, match="no tensor"):
        read(path).tensor(name, (1,), torch.uint8)


def test_a_file_of_another_key_is_refused(path: Path) -> None:
    with pytest.raises(DamagedPackedFileError, match="another file"):
        read(path, bytes(32))


def test_a_file_cut_anywhere_or_made_longer_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in (0, 1, HEAD.size - 1, HEAD.size, 4096, len(content) // 2, len(content) - 1, len(content) + 1):
        path.write_bytes((content + b"\0")[:size])
        with pytest.raises(DamagedPackedFileError):
            read(path)


def test_a_change_of_any_part_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    _, start, length, _, _ = HEAD.unpack(content[: HEAD.size])
    file, places = read(path), [0, 8, 16, 24, 60, 87, start, start + length // 2, start + length - 1]
    for entry in (file.packed(name, shape_of(weight)).data for name, weight in PACKED.items()):
        offset = entry.storage_offset()
        places += [offset, offset + len(entry) // 2, offset + len(entry) - 1]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(DamagedPackedFileError):
            read(path)
    path.write_bytes(content)
    read(path)


def test_pages_that_changed_places_or_never_reached_the_disk_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "large", {"w": torch.arange(4096, dtype=torch.int32)})
    content = bytearray(path.read_bytes())
    content[4096:8192], content[8192:12288] = content[8192:12288], content[4096:8192]
    path.write_bytes(content)
    with pytest.raises(DamagedPackedFileError, match="w has changed"):
        read(path)
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(DamagedPackedFileError, match="w has changed"):
        read(path)


LIES: dict[str, Any] = {
    "offset before the file": lambda t: t["bf16"]["data"].update(offset=-4096),
    "offset beyond it": lambda t: t["bf16"]["data"].update(offset=1 << 40),
    "offset of 2^70": lambda t: t["bf16"]["data"].update(offset=1 << 70),
    "offset that is not aligned": lambda t: t["bf16"]["data"].update(offset=t["bf16"]["data"]["offset"] + 4),
    "offset that is none": lambda t: t["bf16"]["data"].update(offset="4096"),
    "offset that is true": lambda t: t["bf16"]["data"].update(offset=True),
    "shape of 2^62": lambda t: t["bf16"]["data"].update(shape=[1 << 31, 1 << 31]),
    "shape that is negative": lambda t: t["bf16"]["data"].update(shape=[-1]),
    "shape that is none": lambda t: t["bf16"]["data"].update(shape=3),
    "fewer bytes than the fields promise": lambda t: t["bf16"]["data"].update(shape=[64]),
    "dtype that is none": lambda t: t["bf16"]["data"].update(dtype="load"),
    "dtype of another kind": lambda t: t["bf16"]["data"].update(dtype="int8"),
    "dtype of a list": lambda t: t["bf16"]["data"].update(dtype=[]),
    "data that is a number": lambda t: t["bf16"].update(data=5),
    "a wider format": lambda t: t["bf16"].update(format="int8"),
    "an unknown format": lambda t: t["bf16"].update(format="int3"),
    "a format that is none": lambda t: t["bf16"].update(format=[]),
    "compact": lambda t: t["bf16"].update(format="compact"),
    "a group below zero": lambda t: t["bf16"].update(group=-1),
    "a group that is none": lambda t: t["bf16"].update(group=None),
    "scales that are none": lambda t: t["bf16"].update(scales="bfloat16"),
    "scales of a dtype that is none": lambda t: t["bf16"].update(scales={"dtype": "x"}),
    "scales of an integer dtype": lambda t: t["bf16"].update(format="int4", scales={"dtype": "int32"}),
    "no outputs": lambda t: t["bf16"].update(out_features=0),
    "outputs that are none": lambda t: t["bf16"].update(out_features=40.0),
    "2^40 outputs": lambda t: t["bf16"].update(out_features=1 << 40),
    "a field more": lambda t: t["bf16"].update(more=1),
    "a field less": lambda t: t["bf16"].pop("group"),
    "no entry": lambda t: t.pop("bf16"),
    "an entry that is none": lambda t: t.update(bf16=[]),
    "a list": lambda t: [t],
    "depth": lambda t: t["bf16"].update(group=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_refused(path: Path, lie: str) -> None:
    rewrite_table(path, lambda table: value if isinstance(value := LIES[lie](table), list) else None)
    with pytest.raises(DamagedPackedFileError):
        read(path).packed("bf16", (40, 24))


def test_a_table_that_tells_the_truth_is_taken(path: Path) -> None:
    rewrite_table(path, lambda table: None)
    read(path).packed("bf16", (40, 24))
