"""Which block sizes of the attention kernel are the fastest on this GPU, measured and kept as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from latentkv.bench.gpu.attention import GpuCase, PagedCase
from latentkv.bench.gpu.timing import describe_gpu, time_on
from latentkv.bench.ops.mla_decode import LATENT_DIM, ROPE_DIM
from latentkv.errors import RequestError
from latentkv.ops import KVFormat, storage_dtype
from latentkv.ops.backends import why_not_triton
from latentkv.ops.triton.blocks import (
    AttendBlocks,
    AttendShape,
    SharedMemory,
    attend_blocks,
    attend_shared_bytes,
    block_size,
    shared_memory_of,
)
from latentkv.ops.triton.launch import Launch
from latentkv.ops.triton.tuned import save_tuned


@dataclass(frozen=True)
class TunedRow:
    """The fastest sizes of one shape, and how long they and the default ones take.

    Attributes:
        case: sizes.
        kv_format: how the pages are stored.
        blocks: the fastest.
        ms: median milliseconds with them.
        default_ms: with the default ones.
        tried: how many were.
    """

    case: GpuCase
    kv_format: KVFormat
    blocks: AttendBlocks
    ms: float
    default_ms: float
    tried: int


def tune_attention(
    device: torch.device,
    path: Path,
    *,
    cases: Sequence[GpuCase],
    kv_formats: Sequence[KVFormat],
    candidates: Callable[[AttendShape, SharedMemory], Sequence[AttendBlocks]] | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda message: None,
) -> list[TunedRow]:
    """Time candidates for each shape and format, and write the fastest to a file of `ops.triton.tuned`.

    Args:
        device: the GPU.
        path: the file; entries of other GPUs and shapes stay.
        cases: one a number of heads: sizes do not depend on the batch or the lengths, as those may change no bit.
        kv_formats: how the pages are stored.
        candidates: what to try; None: `all_candidates`.
        repeats: timed rounds.
        progress: told what is being done.

    Raises:
        RequestError: Triton's kernels do not run there.
    """
    reason = why_not_triton(device)
    if reason is not None:
        raise RequestError(f"Block sizes cannot be tuned on {device}: Triton's kernels {reason}.")
    rows: list[TunedRow] = []
    with torch.inference_mode():
        for case, kv_format in product(cases, kv_formats):
            shape = AttendShape(case.heads, LATENT_DIM, ROPE_DIM, storage_dtype(kv_format), torch.bfloat16)
            shared = shared_memory_of(device)
            tensors = PagedCase.random(case, kv_format, device)
            sizes = (candidates or all_candidates)(shape, shared)
            progress(f"{case.heads} heads, {kv_format} pages: {len(sizes)} sizes")
            default = attend_blocks(shape, shared)
            ms = {blocks: _milliseconds(device, tensors, blocks, repeats) for blocks in (default, *sizes)}
            best = min(ms, key=ms.__getitem__)
            save_tuned(path, describe_gpu(device).gpu, shape, best)
            rows.append(TunedRow(case, kv_format, best, ms[best], ms[default], len(ms)))
    return rows


def all_candidates(shape: AttendShape, shared: SharedMemory) -> list[AttendBlocks]:
    """Around the default sizes, as far as they fit into shared memory, and their sums into registers."""
    return [
        blocks
        for blocks in _grid(attend_blocks(shape, shared))
        if attend_shared_bytes(shape, blocks.rows, blocks.tokens, blocks.num_stages, holds_queries=shared.holds_queries)
        <= shared.size
        and blocks.rows * block_size(shape.latent_dim) <= 32 * blocks.num_warps * _MOST_SUMS
    ]


_MOST_SUMS = 128
"""Float32 sums of a thread, which has 255 registers."""


def _grid(default: AttendBlocks) -> Iterator[AttendBlocks]:
    rows = {max(16, default.rows // 2), default.rows, min(128, default.rows * 2)}
    for m, n, chunk, warps, stages in product(sorted(rows), (16, 32, 64, 128), (512, 1024, 2048), (4, 8), (1, 3, 5)):
        yield replace(default, rows=m, tokens=n, chunk=chunk, num_warps=warps, num_stages=stages)


def _milliseconds(device: torch.device, tensors: PagedCase, blocks: AttendBlocks, repeats: int) -> float:
    """Median of a call with these sizes; infinite where they need more registers or memory than there are."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    def step() -> None:
        for launch in launches:
            launch.run()

    launches: Sequence[Launch] = tensors.launches(blocks)
    try:
        return time_on(device, {"step": step}, repeats=repeats)["step"].median * 1e3
    except (OutOfResources, PTXASError, CompileTimeAssertionFailure):
        return float("inf")
