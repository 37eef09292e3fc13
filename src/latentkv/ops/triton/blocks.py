"""How large the blocks of a kernel are: what fits into a program's shared memory, by the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latentkv.errors import OpError


@dataclass(frozen=True)
class SharedMemory:
    """What one program may use of a multiprocessor's fast memory.

    Attributes:
        size: in bytes.
        holds_queries: whether Triton keeps the left side of a product there (on AMD it stays in registers).
    """

    size: int
    holds_queries: bool = True


_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""By compute capability (CUDA programming guide, technical specifications by compute capability)."""
NVIDIA = {capability: SharedMemory(kib << 10) for capability, kib in _KIB.items()}
LEAST_NVIDIA = SharedMemory(99 << 10)
AMD = SharedMemory(64 << 10, holds_queries=False)
"""The local data share of a compute unit, CDNA 1 to 3."""

LEAST_BLOCK = 16
"""Rows, columns and depth of the smallest matrix product."""
MOST_ROWS = 64
MOST_ROWS_QUANTISED = 32
"""More would not leave the registers that decoding takes: compilers for sm_80 and sm_90 say so."""

_SCRATCH_BYTES = 8 << 10
"""What changes of layout take beside the blocks, where no pipeline makes room for them."""

_SHAPES = ((64, 3), (32, 3), (64, 1), (16, 3), (32, 1), (16, 1))
"""(tokens of a block, stages), the preferred first: 3 fetch a page number, then its tokens, then multiply."""

_PREFILL_SHAPES = ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 1), (16, 32, 1), (16, 16, 1))
"""(rows, keys of a block, blocks under way at once), the preferred first."""


@dataclass(frozen=True)
class AttendBlocks:
    """Sizes of the attention kernel; all but the number of programs decide the bits of its result.

    Attributes:
        rows: (row, head) pairs of a tile.
        tokens: cached tokens of a block.
        chunk: tokens of a chunk, a multiple of `tokens`.
        num_warps: warps of a program.
        num_stages: stages of the pipeline: 1 waits for each block of tokens, 3 has the next one under way.
    """

    rows: int
    tokens: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TileBlocks:
    """Sizes of a kernel that multiplies tiles.

    Attributes:
        rows: of a tile.
        tokens: keys, or weight rows, of a block.
        num_warps: warps of a program.
        num_stages: blocks under way at once.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttendShape:
    """What the blocks depend on.

    Attributes:
        heads: H.
        latent_dim: L.
        rope_dim: R.
        stored: element type of the pages (uint8: quantised).
        compute: element type of the products.
    """

    heads: int
    latent_dim: int
    rope_dim: int
    stored: torch.dtype
    compute: torch.dtype


def block_size(size: int) -> int:
    """The smallest power of two that holds `size` and that a matrix product takes; 0 for 0."""
    return max(LEAST_BLOCK, 1 << (size - 1).bit_length()) if size else 0


def attend_shared_bytes(
    shape: AttendShape, rows: int, tokens: int, num_stages: int, *, holds_queries: bool = True
) -> int:
    """Bytes of shared memory that a program needs at most: queries, scores, weights and the blocks under way."""
    width = block_size(shape.latent_dim) + block_size(shape.rope_dim)
    under_way = 1 + num_stages // 2
    block = tokens * width * shape.compute.itemsize
    if shape.stored != shape.compute:  # kept as it came, beside the block that is multiplied
        block += tokens * width * shape.stored.itemsize * under_way
    else:
        block *= under_way
    scores = rows * tokens * (4 + shape.compute.itemsize) + (_SCRATCH_BYTES if num_stages == 1 else 0)
    if not holds_queries:  # but the output passes through it where its layout changes
        return max(block + scores, rows * block_size(shape.latent_dim) * shape.compute.itemsize)
    return block + scores + rows * width * shape.compute.itemsize


def attend_blocks(shape: AttendShape, shared: SharedMemory) -> AttendBlocks:
    """The default blocks: as many rows as the heads fill, as many tokens as then fit.

    The rows of a tile depend on the number of heads and not on the batch, which may not change a bit of the result.

    Raises:
        OpError: no block fits.
    """
    most = MOST_ROWS_QUANTISED if shape.stored == torch.uint8 else MOST_ROWS
    rows = min(most, block_size(shape.heads))
    while rows >= LEAST_BLOCK:
        for tokens, stages in _SHAPES:
            needed = attend_shared_bytes(shape, rows, tokens, stages, holds_queries=shared.holds_queries)
            if needed <= shared.size:
                warps = 8 if rows * block_size(shape.latent_dim) >= 64 * 256 else 4
                return AttendBlocks(rows, tokens, chunk=1024, num_warps=warps, num_stages=stages)
        rows //= 2
    raise OpError(
        f"Triton's attention over {shape.latent_dim} + {shape.rope_dim} numbers a token in {shape.compute} does not "
        f"fit into {shared.size:,} bytes of shared memory: use bf16, or let torch compute with LATENTKV_ISA=torch"
    )


def prefill_blocks(key_width: int, value_width: int, compute: torch.dtype, shared: SharedMemory) -> TileBlocks:
    """The default blocks of expanded attention, for keys and values of these padded widths.

    Raises:
        OpError: no block fits.
    """
    size = compute.itemsize
    for rows, tokens, stages in _PREFILL_SHAPES:
        queries = rows * key_width * size if shared.holds_queries else 0
        block = tokens * (key_width + value_width) * size * stages
        passed = rows * max(value_width, key_width) * size  # where a layout changes
        if max(queries + block + rows * tokens * (4 + size), passed) <= shared.size:
            return TileBlocks(rows, tokens, num_warps=8 if rows * value_width >= 64 * 256 else 4, num_stages=stages)
    raise OpError(
        f"Triton's attention over keys of {key_width} and values of {value_width} numbers in {compute} does not fit "
        f"into {shared.size:,} bytes of shared memory: use bf16, or let torch compute with LATENTKV_ISA=torch"
    )


def shared_memory_of(device: torch.device) -> SharedMemory:
    """What a program may use on this device; of a GPU that is not listed, what any of its maker's has."""
    if device.type != "cuda":
        return LEAST_NVIDIA
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return NVIDIA.get(10 * major + minor, LEAST_NVIDIA)
