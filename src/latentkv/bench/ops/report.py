"""Measurements of single ops as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from latentkv.bench.report import CEILING_NOTES

if TYPE_CHECKING:
    from latentkv.bench.layer.sparse import SparseReport
    from latentkv.bench.ops.linear import LinearReport
    from latentkv.bench.ops.mla_decode import DecodeReport

MLA_DECODE_NOTES = (
    "ms: median ± half the interquartile range, contenders timed in turn, each over enough layers that the cache comes "
    "from memory. GFLOP/s: 2 H (2 L + R) a cached token. max error: from the float64 answer, relative to its largest "
    "element. faster: than torch. " + CEILING_NOTES
)


def mla_decode_table(report: DecodeReport) -> Table:
    """A section for each case."""
    table = Table(title="One decode step of absorbed attention, L + R = 512 + 64, bf16 queries")
    for title in ("heads", "context", "batch"):
        table.add_column(title, justify="right")
    table.add_column("attention", no_wrap=True)
    for title in ("ms", "GFLOP/s", "of product ceiling", "GB/s", "of read ceiling", "max error", "faster"):
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


SPARSE_NOTES = (
    "ms: median ± half the interquartile range, contenders timed in turn, each over enough layers that the index keys "
    "come from memory. A layer is all of its attention, projections included; GB/s counts its bf16 weights, the index "
    "keys of all tokens and the latents that it reads. faster: than the dense layer. " + CEILING_NOTES
)


def sparse_table(report: SparseReport) -> Table:
    """A section for each context."""
    table = Table(
        title=f"One decode step of {report.model_type}'s attention to {report.topk:,} tokens, {report.kv_dtype} cache"
    )
    table.add_column("context", justify="right")
    table.add_column("step", no_wrap=True)
    for title in ("ms", "GFLOP/s", "of product ceiling", "GB/s", "of read ceiling", "faster"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        last = index + 1 == len(report.rows) or report.rows[index + 1].context != row.context
        table.add_row(
            f"{row.context:,}",
            row.contender,
            f"{row.ms:.2f} ± {row.spread / 2:.0%}",
            f"{row.gflops:.1f}",
            f"{row.of_bf16_ceiling:.1%}",
            f"{row.gbps:.1f}",
            f"{row.of_read_ceiling:.1%}",
            f"{row.of_dense_time:.1f}x",
            end_section=last,
        )
    return table


LINEAR_NOTES = (
    "Bf16 activations; weights are used in turn so that they come from memory, and GB/s counts the bytes that each "
    "format stores. us: median ± half the interquartile range, contenders timed in turn. max error: from a float64 "
    "product with the same stored weights, relative to its largest element. faster: than torch. "
    "torch, int8 and int4: its own products of the same codes. " + CEILING_NOTES
)


def linear_table(report: LinearReport) -> Table:
    """A section for each number of rows."""
    table = Table(title=f"x W^T, W {report.out_features:,} x {report.in_features:,}")
    table.add_column("rows", justify="right")
    table.add_column("product", no_wrap=True)
    for title in ("us", "GB/s", "of read ceiling", "GFLOP/s", "of product ceiling", "max error", "faster"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        last = index + 1 == len(report.rows) or report.rows[index + 1].rows != row.rows
        table.add_row(
            f"{row.rows}",
            row.contender,
            f"{row.us:,.0f} ± {row.spread / 2:.0%}",
            f"{row.gbps:.1f}",
            f"{row.of_read_ceiling:.1%}",
            f"{row.gflops:.1f}",
            f"{row.of_bf16_ceiling:.1%}",
            f"{row.max_error:.1%}",
            f"{row.times_faster_than_torch:.2f}x",
            end_section=last,
        )
    return table
