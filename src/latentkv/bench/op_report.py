"""Measurements of single ops as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from latentkv.bench.mla_decode import DecodeReport

MLA_DECODE_NOTES = (
    "ms: median ± half the interquartile range, contenders timed in turn, each over enough layers that the cache comes "
    "from memory. GFLOP/s: 2 H (2 L + R) a cached token. max error: from the float64 answer, relative to its largest "
    "element. faster: than torch."
)


def mla_decode_table(report: DecodeReport) -> Table:
    """A section for each case."""
    table = Table(title="One decode step of absorbed attention, L + R = 512 + 64, bf16 queries")
    for title in ("heads", "context", "batch"):
        table.add_column(title, justify="right")
    table.add_column("attention", no_wrap=True)
    for title in ("ms", "GFLOP/s", "of bf16 ceiling", "GB/s", "of read ceiling", "max error", "faster"):
        table.add_column(title, justify="right")
    case = None
    for row in report.rows:
        if case is not None and case != (row.heads, row.context, row.batch):
            table.add_section()
        case = (row.heads, row.context, row.batch)
        table.add_row(
            f"{row.heads}",
            f"{row.context:,}",
            f"{row.batch}",
            row.contender,
            f"{row.ms:.2f} ± {row.spread / 2:.0%}",
            f"{row.gflops:.1f}",
            f"{row.of_bf16_ceiling:.1%}",
            f"{row.gbps:.1f}",
            f"{row.of_read_ceiling:.1%}",
            f"{row.max_error:.1%}",
            f"{row.times_faster_than_torch:.1f}x",
        )
    return table
