import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forked_program import RETURN_WHAT_IS_FREED, run_forked
from latentkv.checkpoint import CheckpointReader
from latentkv.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, generator=generator).to(torch.bfloat16),
        "c.weight": torch.randn(2, 2, 2, generator=generator).to(torch.float16),
        "d.count": torch.arange(4),
        "e.empty": torch.zeros(0, 3),
    }


def save_sharded(folder: Path, *shards: dict[str, torch.Tensor]) -> dict[str, str]:
    weight_map = {}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def handmade(path: Path, header: dict | bytes, body: bytes, length: int | None = None) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + body)


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_comes_back_bit_for_bit_with_its_shape_and_dtype(tmp_path, sharded):
    tensors = some_tensors()
    items = list(tensors.items())
    if sharded:
        save_sharded(tmp_path, dict(items[:2]), dict(items[2:]))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read(name, dtype=torch.float64), tensor.to(torch.float64))


def test_names_come_shard_by_shard(tmp_path):
    save_sharded(tmp_path, {"z": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})
    assert CheckpointReader(tmp_path).names == ("b", "z", "a")


def test_an_unknown_name_is_refused(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    for ask in ("read", "shape", "dtype"):
        with pytest.raises(CheckpointError, match=r"no tensor nope\.weight"):
            getattr(CheckpointReader(tmp_path), ask)("nope.weight")


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    save_file(some_tensors(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for cut in (0, 1, 7, 8, 9, header_end // 2, header_end - 1, header_end, header_end + 1, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
            CheckpointReader(tmp_path)


def test_a_cut_shard_is_refused_by_name(tmp_path):
    save_sharded(tmp_path, {"a": torch.ones(9)}, {"b": torch.ones(9)})
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is truncated"):
        CheckpointReader(tmp_path)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LYING = {
    "length past the end": ({"a": entry(0, 8, [2])}, bytes(8), 10_000),
    "length of exabytes": ({"a": entry(0, 8, [2])}, bytes(8), 2**63),
    "not json": (b"{nonsense", bytes(8), None),
    "not an object": (b"[1, 2]", bytes(8), None),
    "overlapping tensors": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None),
    "a hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20), None),
    "shape larger than its bytes": ({"a": entry(0, 8, [3])}, bytes(8), None),
    "offsets past the end": ({"a": entry(0, 800, [200])}, bytes(8), None),
    "end before start": ({"a": entry(8, 0, [2])}, bytes(8), None),
    "bytes nobody owns": ({"a": entry(0, 8, [2])}, bytes(64), None),
    "unknown dtype": ({"a": entry(0, 8, [2], "F99")}, bytes(8), None),
    "shape that overflows": ({"a": entry(0, 8, [2**40, 2**40])}, bytes(8), None),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_header_is_refused_when_opened(tmp_path, case):
    header, body, length = LYING[case]
    handmade(tmp_path / "model.safetensors", header, body, length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        CheckpointReader(tmp_path)


def test_the_handmade_header_is_fine_when_it_does_not_lie(tmp_path):
    handmade(tmp_path / "model.safetensors", {"a": entry(0, 8, [2])}, struct.pack("<2f", 1, 2))
    assert CheckpointReader(tmp_path).read("a").tolist() == [1, 2]


def test_a_missing_shard_is_named_with_a_tensor_that_needs_it(tmp_path):
    save_sharded(tmp_path, {"a": torch.ones(9)}, {"b": torch.ones(9)})
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-1\.safetensors .*for b"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    weight_map = save_sharded(tmp_path, {"a": torch.ones(9)}, {"b": torch.ones(9)})
    index = {"weight_map": weight_map | {"ghost": "model-0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"ghost in model-0\.safetensors, which lacks it"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../other.safetensors"}}']
)
def test_a_bad_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointReader(tmp_path)


def test_folders_without_usable_weights_say_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        CheckpointReader(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="has no weights"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert to safetensors"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="add the index"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad, dtype):
    weight = torch.ones(300, 3, dtype=dtype)
    weight[217, 1] = bad
    save_file({"good": torch.ones(2), "model.bad.weight": weight}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.read("good")
    with pytest.raises(CheckpointError, match=r"model\.bad\.weight holds NaN or infinite"):
        reader.read("model.bad.weight")


def test_a_value_that_the_asked_dtype_cannot_hold_is_refused(tmp_path):
    save_file({"big": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.read("big", dtype=torch.bfloat16).item() == pytest.approx(1e6, rel=0.01)
    with pytest.raises(CheckpointError, match=r"big holds .* as float16"):
        reader.read("big", dtype=torch.float16)


PEAK = """
import sys, torch
from pathlib import Path
from latentkv.checkpoint import CheckpointReader, reader as module

module._MAX_MAPPED_BYTES = 16 * 2**20
def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024

torch.ones(1).to(torch.bfloat16).aminmax()
reader = CheckpointReader(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of importing
before = peak()
for name in reader.names:
    reader.read(name, dtype=torch.float32)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is read from /proc")
def test_reading_a_large_file_holds_a_part_of_it_at_a_time(tmp_path):
    tensors = {f"t{i:02}": torch.ones(4 * 2**20, dtype=torch.bfloat16) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    _, peak, said = run_forked(RETURN_WHAT_IS_FREED + PEAK, tmp_path)
    one, size = tensors["t00"].nbytes, 20 * tensors["t00"].nbytes
    assert not said and one < int(peak) < size / 2  # all of it, and more, if files stayed mapped
