"""Measurements on a GPU as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from latentkv.bench.gpu.attention import GpuReport
    from latentkv.bench.gpu.timing import GpuEnvironment
    from latentkv.bench.gpu.tune import TunedRow

GPU_NOTES = (
    "ms: median ± half the interquartile range, formats and ceilings timed in turn. TFLOP/s: 2 H (2 L + R) a cached "
    "token. GB/s: the cached tokens read once; of copy: over the bytes that a copy reads and writes in the same time. "
    "max error: from the float64 answer, relative to its largest element."
)


def gpu_attention_table(report: GpuReport) -> Table:
    """A section for each case."""
    table = Table(title="One decode step of absorbed attention, L + R = 512 + 64, bf16 queries")
    for title in ("heads", "batch", "context"):
        table.add_column(title, justify="right")
    table.add_column("pages")
    for title in ("ms", "TFLOP/s", "of bf16 product", "GB/s", "of copy", "max error"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        case = row.heads, row.batch, row.context
        following = report.rows[index + 1 : index + 2]
        table.add_row(
            f"{row.heads}",
            f"{row.batch}",
            f"{row.context:,}",
            row.kv_format,
            f"{row.ms:.3f} ± {row.spread / 2:.0%}",
            f"{row.tflops:.1f}",
            f"{row.of_bf16_ceiling:.1%}",
            f"{row.gbps:,.0f}",
            f"{row.of_copy_ceiling:.1%}",
            f"{row.max_error:.1%}",
            end_section=any((other.heads, other.batch, other.context) != case for other in following),
        )
    return table


def tuned_table(rows: Sequence[TunedRow]) -> Table:
    """A line for each shape."""
    table = Table(title="The fastest block sizes")
    for title in ("heads", "pages", "rows", "tokens", "chunk", "warps", "stages", "ms", "default ms", "tried"):
        table.add_column(title, justify="right")
    for row in rows:
        blocks = row.blocks
        sizes = (blocks.rows, blocks.tokens, blocks.chunk, blocks.num_warps, blocks.num_stages)
        times = f"{row.ms:.3f}", f"{row.default_ms:.3f}", f"{row.tried}"
        table.add_row(f"{row.case.heads}", row.kv_format, *(str(size) for size in sizes), *times)
    return table


def describe_gpu_environment(environment: GpuEnvironment) -> str:
    """One line: where this was measured."""
    return f"{environment.gpu}, torch {environment.torch}, triton {environment.triton}, Python {environment.python}"
