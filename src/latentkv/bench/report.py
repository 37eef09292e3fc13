"""Measurements as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from latentkv.bench.layer.contenders import LATENTKV, TRANSFORMERS

if TYPE_CHECKING:
    from latentkv.bench.ceilings import Ceilings
    from latentkv.bench.environment import Environment
    from latentkv.bench.layer.attention import AttentionReport, AttentionRow


def describe(environment: Environment) -> str:
    """One line: where this was measured."""
    transformers = f", transformers {environment.transformers}" if environment.transformers else ""
    threads = f"{environment.threads} thread{'s' if environment.threads > 1 else ''}"
    load = f", load {environment.load_before:g} before" if environment.load_before > 1 else ""
    return f"{environment.cpu}, {threads}, {environment.kernels} kernels, torch {environment.torch}{transformers}{load}"


def ceilings_table(ceilings: Ceilings) -> Table:
    """What the machine can do at most."""
    table = Table(title="What this machine can do")
    table.add_column("operation")
    table.add_column("median", justify="right")
    table.add_column("spread", justify="right")
    table.add_column("one thread", justify="right")
    for label, name, one_thread, unit in (
        ("bf16 matrix product", "bf16_gflops", "one_thread_bf16_gflops", "GFLOP/s"),
        ("fp32 matrix product", "fp32_gflops", "", "GFLOP/s"),
        ("int8 matrix product", "int8_gops", "", "GOP/s"),
        ("reading memory", "read_gbps", "one_thread_read_gbps", "GB/s"),
    ):
        table.add_row(
            label,
            f"{getattr(ceilings, name):,.1f} {unit}",
            f"± {ceilings.spread[name] / 2:.0%}",
            f"{getattr(ceilings, one_thread):,.1f}" if one_thread else "",
        )
    return table


def attention_title(report: AttentionReport) -> str:
    """What was measured, in one line."""
    mla = report.shape.mla
    return (
        f"One decode step of one attention layer: hidden {report.shape.hidden_size}, {report.shape.num_heads} heads, "
        f"latent {mla.kv_lora_rank} + {mla.qk_rope_head_dim}, bf16 weights, {report.kv_dtype} latent cache, batch 1"
    )


def attention_table(report: AttentionReport) -> Table:
    """The comparison; a section for each context."""
    table = Table(title=attention_title(report))
    table.add_column("context", justify="right")
    table.add_column("attention", no_wrap=True)
    for title in ("ms", "GFLOP", "GFLOP/s", "of product ceiling", "GB/s", "cache bytes", "plan", "max error", "faster"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        last = index + 1 == len(report.rows) or report.rows[index + 1].context != row.context
        style = "bold" if row.contender == LATENTKV else None
        table.add_row(f"{row.context:,}", *_attention_cells(report, row), end_section=last, style=style)
    return table


def _attention_cells(report: AttentionReport, row: AttentionRow) -> list[str]:
    name = f"{row.contender}, {report.transformers_attention}" if row.contender == TRANSFORMERS else row.contender
    m = row.measured
    if m is None:
        return [name, row.note]
    equal = m.cache_bytes == m.planned_cache_bytes
    faster = m.times_faster_than_transformers
    return [
        name,
        f"{m.ms:.2f} ± {m.spread / 2:.0%}",
        f"{m.gflop:.3f}",
        f"{m.gflops:.1f}",
        f"{m.of_bf16_ceiling:.1%}",
        f"{m.gbps:.1f}",
        f"{m.cache_bytes:,}",
        "equal" if equal else f"{m.planned_cache_bytes:,}",
        f"{m.max_error:.1%}",
        "" if faster is None else f"{faster:.1f}x",
    ]


CEILING_NOTES = "of product ceiling: of torch's product of large matrices in bf16, or in float32 where that is faster."

ATTENTION_NOTES = (
    "ms: median ± half the interquartile range, contenders timed in turn. GFLOP: arithmetic of a step of each form; "
    "transformers' includes expanding the whole cache again. GB/s: weights and cache read once. max error: from the "
    "float64 answer, relative to its largest element. faster: than transformers. " + CEILING_NOTES
)
