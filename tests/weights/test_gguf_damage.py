"""Files in GGUF that cannot be: one sentence for each, and nothing allocated for what they claim."""

from __future__ import annotations

import os
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fault"))

from damage import damaged_bytes
from gguf_files import ARRAY, KEYS, STRING, TENSORS, U8, U32, Written, part_keys, refusal, write_parts

from latentkv.errors import CheckpointError
from latentkv.weights.gguf.container import GGUFFile, open_gguf
from latentkv.weights.gguf.types import dequantize

DAMAGE: dict[str, tuple[str, int, str]] = {
    "tensors beyond the file": ("tensors", 2**62, "counts 4,611,686,018,427,387,904 tensors, more than fit in its"),
    "tensors of 64 bits": ("tensors", 2**64 - 1, "more than fit"),
    "one tensor too many": ("tensors", 4, "is damaged ("),
    "keys beyond the file": ("keys", 2**62, "counts 4,611,686,018,427,387,904 keys, more than fit in its"),
    "length of a key": ("general.architecture: length of key", 2**62, "more than the 65,535 that it may"),
    "key past the end": ("general.architecture: length of key", 60_000, "it ends inside a key"),
    "length of a text": ("general.architecture: length", 2**62, "the value of 'general.architecture' has"),
    "text past the end": ("general.architecture: length", 2**20, "it ends inside the value of 'general.architecture'"),
    "texts": ("tokenizer.ggml.tokens: count", 2**62, "is 4,611,686,018,427,387,904 texts, more than fit in its"),
    "length of a text of many": ("tokenizer.ggml.tokens 1: length", 2**62, "it ends inside the value of 'tok"),
    "negative length": ("tokenizer.ggml.tokens 1: length", 2**64 - 1, "it ends inside the value of 'tok"),
    "numbers": ("tokenizer.ggml.scores: count", 2**62, "it ends inside the value of 'tokenizer.ggml.scores'"),
    "arrays of arrays": ("tokenizer.ggml.scores: inner type", ARRAY, "is an array of arrays"),
    "kind of value": ("llama.block_count: type", 13, "the value of 'llama.block_count' is of type 13"),
    "kind of values": ("tokenizer.ggml.scores: inner type", 77, "is of type 77, which is not known"),
    "truth": ("tokenizer.ggml.add_bos_token: value", 2, "is neither true nor false"),
    "axes": ("q: axes", 5, "tensor 'q' has 5 axes, more than the 4 that it may"),
    "axes of 32 bits": ("q: axes", 2**32 - 1, "has 4,294,967,295 axes"),
    "no rows": ("q: ne1", 0, "tensor 'q' of shape [0, 64] holds nothing"),
    "rows past the end": ("q: ne1", 300, "tensor 'q' ends 19,"),
    "rows beyond 64 bits": ("q: ne1", 2**62, "bytes past its end"),
    "rows that overflow": ("experts: ne2", 2**63, "bytes past its end"),
    "row of half a block": ("q: ne0", 48, "tensor 'q' of shape [3, 48] has rows that Q8_0's 32 does not divide"),
    "type": ("q: type", 200, "stores tensor 'q' as type number 200, which is not known: use a file"),
    "type of another program": (
        "q: type",
        137,
        "IQ2_K, which ik_llama.cpp alone has: use a file whose weights are F32",
    ),
    "type that was removed": ("q: type", 31, "Q4_0_4_4, which llama.cpp itself no longer reads"),
    "place between multiples": ("q: offset", 40, "tensor 'q' starts at 40, no multiple of 32"),
    "place of another": ("experts: offset", 64, "tensors 'q' and 'experts' share bytes"),
    "same place": ("q: offset", 0, "share bytes"),
    "place past the end": ("q: offset", 2**62, "tensor 'q' ends 4,6"),
    "place at the end of 64 bits": ("q: offset", 2**64 - 32, "bytes past its end"),
    "big-endian version": ("version", 0x03000000, "is a big-endian GGUF file"),
    "first version": ("version", 1, "is GGUF of version 1, and 2 and 3 are read"),
    "coming version": ("version", 4, "is GGUF of version 4, and 2 and 3 are read"),
    "version 0": ("version", 0, "is GGUF of version 0"),
}


@pytest.mark.parametrize(("field", "value", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_numbers_that_cannot_be_are_refused_before_they_are_used(
    tmp_path: Path, field: str, value: int, sentence: str
) -> None:
    path = Written().put(field, value).write(tmp_path / "m.gguf")
    tracemalloc.start()
    try:
        found = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert sentence in found


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33, 2**31 + 1])
def test_alignments_that_are_none_are_refused(tmp_path: Path, alignment: int) -> None:
    keys = (*KEYS, ("general.alignment", U32, alignment))
    assert f"general.alignment is {alignment}, no power of two" in refusal(Written(keys).write(tmp_path / "m.gguf"))


def test_an_alignment_that_is_no_number_is_refused(tmp_path: Path) -> None:
    keys = (("general.alignment", STRING, "32"),)
    assert "its general.alignment is no whole number" in refusal(Written(keys).write(tmp_path / "m.gguf"))


def test_keys_and_tensors_that_come_twice_are_refused(tmp_path: Path) -> None:
    assert "the key 'general.architecture' comes twice" in refusal(
        Written((*KEYS, KEYS[0])).write(tmp_path / "keys.gguf")
    )
    assert "tensor 'q' comes twice" in refusal(Written(KEYS, (*TENSORS, TENSORS[1])).write(tmp_path / "tensors.gguf"))


def test_texts_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    for text, what in ((b"naive", "a key"), (b"na\xc3\xafve", "the value of 'tokenizer.ggml.tokens'")):
        written = Written((("naive", U8, 1), *KEYS))
        at = written.data.index(text)
        written.data[at : at + 5] = b"na\xffve"
        assert f"{what} is no UTF-8" in refusal(written.write(tmp_path / "m.gguf"))


def test_more_keys_and_tensors_than_any_model_has_are_refused(tmp_path: Path) -> None:
    many = Written((), ()).put("keys", 70_000)
    many.data += bytes(13) * 70_000
    assert "counts 70,000 keys, more than the 65,536 that it may" in refusal(many.write(tmp_path / "keys.gguf"))
    many = Written((), ()).put("tensors", 300_000)
    many.data += bytes(24) * 300_000
    assert "counts 300,000 tensors, more than the 262,144" in refusal(many.write(tmp_path / "tensors.gguf"))


def test_a_header_larger_than_any_model_has_is_refused(tmp_path: Path) -> None:
    path = Written((("x", ARRAY, (U8, [])),), ()).put("x: count", 200 << 20).write(tmp_path / "m.gguf")
    os.truncate(path, 1 << 30)
    assert "its header has more than the 134,217,728 bytes that it may" in refusal(path)


def test_every_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    whole = bytes(Written().data)
    path = tmp_path / "m.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)


def test_other_kinds_of_files_are_called_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for content, sentence in (
        (b"", "has only 0 bytes, too few for GGUF"),
        (b"GGUF\3\0\0\0", "has only 8 bytes, too few for GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "is no GGUF file (it begins with b'<!DO')"),
        (b"tjgg" + bytes(64), "has a format that GGUF replaced in 2023"),
        (b"FUGG" + bytes(64), "is a big-endian GGUF file"),
        (struct.pack("<Q", 64) + b'{"__metadata__":{"format":"pt"}}', "is no GGUF file"),
    ):
        path.write_bytes(content)
        assert sentence in refusal(path)


def test_big_endian_files_of_the_gguf_package_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is a big-endian GGUF file" in refusal(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "missing.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "is no regular file: name the .gguf file itself" in refusal(tmp_path / "folder.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is no regular file" in refusal(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to("blobs/0123")
    assert "is a link to blobs/0123, which is not there" in refusal(tmp_path / "link.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf("null\0character.gguf")


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    Written().write(tmp_path / "blob")
    (tmp_path / "m.gguf").symlink_to("blob")
    assert set(open_gguf(tmp_path / "m.gguf").tensors) == {name for name, *_ in TENSORS}


# Damaged files by the hundred

NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 31, 32, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS += (2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
WIDTHS = {"<B": 1, "<?": 1, "<H": 2, "<I": 4, "<i": 4, "<f": 4, "<Q": 8}


def damaged(random: Random, written: Written) -> bytes:
    """A file with one to three of its numbers replaced, or with its bytes damaged."""
    data = bytearray(written.data)
    if random.random() < 0.3:
        return damaged_bytes(random, bytes(data))
    for field in random.sample(sorted(written.at), random.randint(1, 3)):
        at, form = written.at[field]
        width = WIDTHS[form]
        data[at : at + width] = random.choice(NUMBERS).to_bytes(8, "little")[:width]
    return bytes(data)


def look_at_all(model: GGUFFile) -> None:
    """Everything that a file lets be seen is inside it."""
    for name, info in model.tensors.items():
        raw = model.read(name)
        assert raw.nbytes == info.nbytes <= info.file.stat().st_size
        if info.type.decode:
            assert dequantize(raw, info.type).numel() == np.prod(info.shape)
        else:
            int(raw.sum())


def run_cases(folder: Path, cases: int) -> None:
    paths = write_parts(folder)
    whole, parts = Written(), [path.read_bytes() for path in paths]
    single = folder / "m.gguf"
    refused, failed = 0, {}
    tracemalloc.start()
    for case in range(cases):
        random = Random(zlib.crc32(f"gguf-{case}".encode()))
        target = random.choice((single, single, single, *paths))
        number = paths.index(target) if target in paths else None
        keys = part_keys(number, 3, 3) if number is not None else ()
        base = whole if number is None else Written((*(KEYS if not number else ()), *keys), (TENSORS[number],))
        target.write_bytes(damaged(random, base))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            look_at_all(open_gguf(target))
        except CheckpointError as error:
            refused += 1
            if "\n" in str(error) or not str(error):
                failed[case] = f"no sentence: {error!r}"
        except BaseException as error:
            failed[case] = repr(error)[:200]
        peak = tracemalloc.get_traced_memory()[1] - before
        if peak > 1 << 20:
            failed[case] = f"{peak:,} bytes"
        if number is not None:
            target.write_bytes(parts[number])
    tracemalloc.stop()
    assert not failed, "\n".join(f"{case}: {how}" for case, how in failed.items())
    assert cases // 2 < refused < cases


def test_damaged_files_end_in_their_weights_or_in_one_sentence(tmp_path: Path) -> None:
    run_cases(tmp_path, 200)


@pytest.mark.slow
def test_damaged_files_end_so_by_the_thousand(tmp_path: Path) -> None:
    run_cases(tmp_path, 2_000)
