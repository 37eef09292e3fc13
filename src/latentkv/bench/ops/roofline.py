"""The decode op against what arithmetic and memory allow at most (Williams et al., doi 10.1145/1498765.1498785)."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from latentkv.bench.ops.mla_decode import DecodeReport, DecodeRow
from latentkv.bench.report import describe
from latentkv.files import write_whole

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v")


def plot_roofline(report: DecodeReport, path: Path) -> None:
    """GFLOP/s of every case against its FLOPs a byte of cache, under the two ceilings; PNG, whole or absent."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = report.rows
    contenders = list(dict.fromkeys(row.contender for row in rows))
    heads = sorted({row.heads for row in rows})
    for row in rows:
        axes.scatter(
            _intensity(row),
            row.gflops,
            color=_COLORS[contenders.index(row.contender) % len(_COLORS)],
            marker=_MARKERS[heads.index(row.heads) % len(_MARKERS)],
            s=42,
            alpha=0.75,
            linewidths=0,
            zorder=3,
        )
    _draw_roof(axes, rows)
    for index, name in enumerate(contenders):
        axes.scatter([], [], color=_COLORS[index % len(_COLORS)], label=name)
    for index, number in enumerate(heads):
        axes.scatter([], [], color="#666666", marker=_MARKERS[index % len(_MARKERS)], label=f"{number} heads")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte of cache", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(which="major", color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title("One decode step of latent attention, each point a context and a batch", loc="left", fontsize=11)
    figure.supxlabel(describe(report.environment), fontsize=7, color="#666666")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))


def _intensity(row: DecodeRow) -> float:
    return row.gflops / row.gbps


def _draw_roof(axes: Axes, rows: tuple[DecodeRow, ...]) -> None:
    """What memory allows (rising) and what the bf16 products allow (flat): medians over the cases."""
    gflops = statistics.median(row.bf16_ceiling for row in rows)
    gbps = statistics.median(row.read_ceiling for row in rows)
    ridge = gflops / gbps
    left = min(ridge, *(_intensity(row) for row in rows)) / 2
    right = max(ridge, *(_intensity(row) for row in rows)) * 2
    axes.plot([left, ridge, right], [left * gbps, gflops, gflops], color="#333333", linewidth=1.5, zorder=2)
    axes.annotate(
        f"bf16 matrix product, {gflops:,.0f} GFLOP/s", (right, gflops), (0, 4), ha="right", textcoords="offset points"
    )
    axes.annotate(f"reading, {gbps:,.0f} GB/s", (left, left * gbps), (8, 0), textcoords="offset points", va="center")
