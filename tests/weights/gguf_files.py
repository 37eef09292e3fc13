"""GGUF files written by hand, each of whose numbers can be replaced, and what is said of those that cannot be."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from latentkv.errors import CheckpointError
from latentkv.weights.gguf.container import open_gguf

U8, U16, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 5, 4, 6, 7, 8, 9, 10
_FORMATS = {U8: "<B", U16: "<H", I32: "<i", U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}

KEYS: tuple[tuple[str, int, Any], ...] = (
    ("general.architecture", STRING, "llama"),
    ("llama.block_count", U32, 2),
    ("llama.rope.freq_base", F32, 10000.0),
    ("tokenizer.ggml.add_bos_token", BOOL, True),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "naïve", "鲸", ""])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, -1.5, -2.0, 3.0])),
)
TENSORS: tuple[tuple[str, tuple[int, ...], int, bytes], ...] = (
    ("norm", (4,), 0, struct.pack("<4f", 1, 2, 3, 4)),
    ("q", (64, 3), 8, bytes(range(204))),
    ("experts", (256, 2, 2), 12, bytes(576)),
)


class Written:
    """A file's bytes; `at` says where each of its numbers is, and as what it is packed."""

    def __init__(
        self,
        keys: tuple[tuple[str, int, Any], ...] = KEYS,
        tensors: tuple[tuple[str, tuple[int, ...], int, bytes], ...] = TENSORS,
        version: int = 3,
        alignment: int = 32,
    ) -> None:
        self.data = bytearray(b"GGUF")
        self.at: dict[str, tuple[int, str]] = {}
        self._number("version", "<I", version)
        self._number("tensors", "<Q", len(tensors))
        self._number("keys", "<Q", len(keys))
        for key, kind, value in keys:
            self._text(f"{key}: length of key", key)
            self._number(f"{key}: type", "<I", kind)
            self._value(key, kind, value)
        offset = 0
        for name, dims, kind, data in tensors:
            self._text(f"{name}: length of name", name)
            self._number(f"{name}: axes", "<I", len(dims))
            for axis, size in enumerate(dims):
                self._number(f"{name}: ne{axis}", "<Q", size)
            self._number(f"{name}: type", "<I", kind)
            self._number(f"{name}: offset", "<Q", offset)
            offset += -(-len(data) // alignment) * alignment
        for *_, data in tensors:
            self.data += bytes(-len(self.data) % alignment) + data

    def put(self, field: str, value: Any) -> Written:
        at, form = self.at[field]
        struct.pack_into(form.replace("?", "B"), self.data, at, value)
        return self

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path

    def _number(self, field: str, form: str, value: Any) -> None:
        self.at[field] = (len(self.data), form)
        self.data += struct.pack(form, value)

    def _text(self, field: str, text: str) -> None:
        encoded = text.encode()
        self._number(field, "<Q", len(encoded))
        self.data += encoded

    def _value(self, key: str, kind: int, value: Any) -> None:
        if kind == STRING:
            self._text(f"{key}: length", value)
        elif kind == ARRAY:
            inner, values = value
            self._number(f"{key}: inner type", "<I", inner)
            self._number(f"{key}: count", "<Q", len(values))
            for each, item in enumerate(values):
                self._value(f"{key} {each}", inner, item)
        else:
            self._number(f"{key}: value", _FORMATS[kind], value)


def part_keys(number: int, count: int, tensors: int) -> tuple[tuple[str, int, Any], ...]:
    """What a file of a split model says of its place."""
    return (("split.no", U16, number), ("split.count", U16, count), ("split.tensors.count", I32, tensors))


def write_parts(folder: Path) -> list[Path]:
    """The tensors of `TENSORS` in three files, the keys in the first."""
    return [
        Written((*(KEYS if number == 0 else ()), *part_keys(number, 3, 3)), (TENSORS[number],)).write(
            folder / f"m-{number + 1:05}-of-00003.gguf"
        )
        for number in range(3)
    ]


def refusal(path: Path) -> str:
    """The sentence that a file ends in, which names it."""
    with pytest.raises(CheckpointError) as refused:
        open_gguf(path)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert str(path) in sentence or path.name in sentence
    assert ": " in sentence.replace(str(path), "")  # what is wrong, and what to do
    return sentence
