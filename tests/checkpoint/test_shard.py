"""A safetensors file written a tensor at a time is what the safetensors library expects."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentkv.checkpoint.shard import entry_bytes, write_shard
from latentkv.errors import CheckpointError

TENSORS = {
    "b.odd": torch.arange(5, dtype=torch.int8),
    "a.half": torch.randn(3, 5).bfloat16(),
    "long": torch.tensor([3, 5]),
    "f8": torch.randn(3).to(torch.float8_e4m3fn),
    "float": torch.randn(2, 3, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 3),
    "yes": torch.tensor([True, False, True]),
    "strided": torch.randn(6, 4)[::2, 1:],
}
ENTRIES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_the_library_reads_every_tensor_bit_for_bit_whatever_order_they_came_in(tmp_path, order):
    path = tmp_path / "model.safetensors"
    write_shard(path, ENTRIES, list(TENSORS.items())[::order])
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].view(torch.uint8) if name == "f8" else read[name], as_bytes(name, tensor))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def as_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if name == "f8" else tensor


def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path):
    path = tmp_path / "model.safetensors"
    for tensors, words in (
        ([("long", torch.tensor([3]))], "long was announced otherwise"),
        ([("long", torch.tensor([3, 5], dtype=torch.int32))], "long was announced otherwise"),
        ([("new", torch.ones(1))], "new was announced otherwise"),
        ([("long", TENSORS["long"])] * 2, "long was announced otherwise, or comes twice"),
        ([("long", TENSORS["long"])], r"a\.half was announced and did not come"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_shard(path, ENTRIES, tensors)
        assert not any(tmp_path.iterdir())


def test_what_was_there_before_stays_when_writing_fails(tmp_path):
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": ENTRIES["long"]}, [("a", TENSORS["long"])])
    before = path.read_bytes()

    def full_disk():
        yield "a", TENSORS["long"]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shard(path, {"a": ENTRIES["long"]}, full_disk())
    assert path.read_bytes() == before and [p.name for p in Path(tmp_path).iterdir()] == [path.name]


def test_bytes_of_an_entry():
    assert entry_bytes((torch.bfloat16, (3, 5))) == 30
    assert entry_bytes((torch.int64, ())) == 8
