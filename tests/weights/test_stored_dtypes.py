"""Every dtype that safetensors knows means the same to reading, inspecting and sizing."""

import json
import struct

import pytest
import torch
from safetensors import safe_open

from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError
from latentkv.weights.files.dtypes import NAMES, STORED


def file_of(folder, dtype, shape=(4, 4), nbytes=None):
    size = STORED[dtype].nbytes(shape) if nbytes is None else nbytes
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return CheckpointReader(folder)


@pytest.mark.parametrize("dtype", STORED)
def test_the_table_agrees_with_safetensors_on_names_and_sizes(tmp_path, dtype):
    reader = file_of(tmp_path, dtype)  # safetensors itself refuses a file of another size
    assert reader.nbytes("a.weight") == (tmp_path / "model.safetensors").stat().st_size - 8 - header_bytes(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_slice("a.weight").get_dtype() == dtype
        if STORED[dtype].torch is not None:
            tensor = file.get_tensor("a.weight")
            assert (tensor.dtype, tensor.nbytes) == (STORED[dtype].torch, reader.nbytes("a.weight"))
            assert NAMES[tensor.dtype] == dtype


def header_bytes(folder):
    return struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0]


@pytest.mark.parametrize("dtype", STORED)
def test_what_is_no_weight_is_refused_by_name_before_and_while_it_is_read(tmp_path, dtype):
    reader = file_of(tmp_path, dtype)
    assert reader.shown_dtype("a.weight")
    if dtype in ("F64", "F32", "F16", "BF16"):
        assert reader.why_unreadable("a.weight") is None
        assert reader.read("a.weight").dtype == STORED[dtype].torch
    else:
        reason = reader.why_unreadable("a.weight")
        assert "a.weight" in reason
        assert reader.shown_dtype("a.weight") in reason or "has no a.weight_scale_inv" in reason


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_numbers_that_torch_lacks_are_refused_by_name(tmp_path, dtype):
    with pytest.raises(CheckpointError, match=rf"a\.weight is stored as {dtype}"):
        file_of(tmp_path, dtype).read("a.weight")


def test_sizes_of_numbers_that_are_no_whole_bytes():
    assert STORED["F4"].nbytes((3, 6)) == 9
    assert STORED["F6_E2M3"].nbytes((4, 4)) == 12
    assert STORED["C64"].nbytes((2,)) == 16
    assert STORED["BOOL"].nbytes(()) == 1
    assert STORED["F8_E8M0"].torch == torch.float8_e8m0fnu
