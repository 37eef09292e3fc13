"""The default sizes of blocks, and those that were measured."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from latentkv.errors import ConfigError, OpError
from latentkv.ops.triton import tuned
from latentkv.ops.triton.blocks import (
    AMD,
    LEAST_BLOCK,
    NVIDIA,
    AttendBlocks,
    AttendShape,
    SharedMemory,
    attend_blocks,
    attend_shared_bytes,
    block_size,
    prefill_blocks,
    shared_memory_of,
)

BF16 = torch.bfloat16


@pytest.mark.parametrize("shared", [*NVIDIA.values(), AMD])
def test_blocks_of_every_shape_fit_into_every_gpu(shared: SharedMemory) -> None:
    formats = [(BF16, BF16), (torch.uint8, BF16), (torch.float32, torch.float32), (torch.uint8, torch.float32)]
    for heads, latent, (stored, compute) in product([1, 16, 20, 40, 128], [64, 256, 512], formats):
        shape = AttendShape(heads, latent, 64, stored, compute)
        blocks = attend_blocks(shape, shared)
        needed = attend_shared_bytes(
            shape, blocks.rows, blocks.tokens, blocks.num_stages, holds_queries=shared.holds_queries
        )
        assert needed <= shared.size
        assert min(blocks.rows, blocks.tokens) >= LEAST_BLOCK
        assert blocks.chunk % blocks.tokens == 0


def test_tiles_have_as_many_rows_as_the_heads_fill() -> None:
    rows = [attend_blocks(AttendShape(h, 512, 64, BF16, BF16), NVIDIA[90]).rows for h in (1, 16, 20, 40, 128)]
    assert rows == [16, 16, 32, 64, 64]


def test_what_cannot_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(OpError, match="let torch compute with LATENTKV_ISA=torch"):
        attend_blocks(AttendShape(1, 4096, 64, torch.float32, torch.float32), NVIDIA[89])
    with pytest.raises(OpError, match="let torch compute with LATENTKV_ISA=torch"):
        prefill_blocks(4096, 4096, torch.float32, AMD)


@pytest.mark.parametrize("shared", [*NVIDIA.values(), AMD])
def test_prefill_blocks_of_every_model_fit_into_every_gpu(shared: SharedMemory) -> None:
    for keys, values, compute in product([96, 192, 256], [64, 128, 256], [BF16, torch.float32]):
        assert prefill_blocks(keys, values, compute, shared).rows >= LEAST_BLOCK


def test_sizes_are_padded_to_what_a_product_takes() -> None:
    assert [block_size(n) for n in (0, 1, 16, 17, 44, 512)] == [0, 16, 16, 32, 64, 512]


SHAPE = AttendShape(128, 512, 64, BF16, BF16)
BLOCKS = AttendBlocks(rows=32, tokens=16, chunk=512, num_warps=4, num_stages=3)


def test_measured_sizes_are_found_again_for_their_gpu_and_shape_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.json"
    tuned.save_tuned(path, "Some GPU", SHAPE, BLOCKS)
    tuned.save_tuned(path, "Another GPU", SHAPE, AttendBlocks(16, 16, 1024, 4, 1))
    monkeypatch.setattr(tuned, "TUNED_FILE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuned.blocks_for.cache_clear()
    try:
        gpu, other = torch.device("cuda"), AttendShape(16, 512, 64, BF16, BF16)
        assert tuned.blocks_for(SHAPE, gpu) == BLOCKS
        assert tuned.blocks_for(other, gpu) == attend_blocks(other, NVIDIA[90])
        assert tuned.blocks_for(SHAPE, torch.device("cpu")) == attend_blocks(
            SHAPE, shared_memory_of(torch.device("cpu"))
        )
    finally:
        tuned.blocks_for.cache_clear()


def test_the_committed_file_is_one_of_its_kind() -> None:
    assert isinstance(tuned.read_tuned(tuned.TUNED_FILE), dict)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        (json.dumps({"Some GPU": {"H=1": {"rows": 16}}}), "does not hold block sizes"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"tuned.json {said}"):
        tuned.read_tuned(path)
