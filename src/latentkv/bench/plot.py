"""The attention comparison as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from latentkv.bench.layer.attention import CONTENDERS, AttentionReport
from latentkv.bench.layer.contenders import LATENTKV, MHA_MATMUL, MHA_SDPA, TRANSFORMERS
from latentkv.bench.report import describe
from latentkv.files import write_whole

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_STYLE = {
    LATENTKV: ("#0072B2", "o", "-"),
    TRANSFORMERS: ("#D55E00", "s", "-"),
    MHA_SDPA: ("#009E73", "^", "-"),
    MHA_MATMUL: ("#009E73", "v", "--"),
}


def plot_attention(report: AttentionReport, path: Path) -> None:
    """Milliseconds of a decode step against context, both logarithmic, one line a contender; PNG, whole or absent."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[tuple[float, float, str]] = []
    for contender in CONTENDERS:
        points = [(r.context, r.measured.ms) for r in report.rows if r.contender == contender and r.measured]
        if not points:
            continue
        contexts, times = zip(*points, strict=True)
        color, marker, line = _STYLE[contender]
        axes.plot(contexts, times, color=color, marker=marker, linestyle=line, linewidth=2, label=contender)
        ends.append((contexts[-1], times[-1], color))
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="milliseconds a decode step")
    contexts = sorted({row.context for row in report.rows})
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(tokens_label))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_number_label))
    axes.margins(x=0.12)
    axes.grid(which="major", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    shape = report.shape
    axes.set_title(
        f"One attention layer, {shape.num_heads} heads, hidden {shape.hidden_size}, bf16, batch 1", loc="left"
    )
    figure.supxlabel(describe(report.environment), fontsize=7, color="#666666")
    _label_ends(figure, axes, ends)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))


def _label_ends(figure: Figure, axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Write each line's last value beside it, from the lowest up, each far enough above the one before to be read."""
    figure.draw_without_rendering()  # settles the layout, so that heights are known
    lowest_free = 0.0
    for context, ms, color in sorted(ends, key=lambda end: end[1]):
        height = float(axes.transData.transform((context, ms))[1]) * 72 / figure.dpi
        shift = max(0.0, lowest_free - height)
        lowest_free = height + shift + 12
        axes.annotate(
            f"{_milliseconds(ms)} ms", (context, ms), (7, shift), textcoords="offset points", va="center", color=color
        )


def _milliseconds(ms: float) -> str:
    """Three digits, without an exponent."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def tokens_label(tokens: float, _position: int | None = None) -> str:
    """1024 as 1k."""
    return f"{int(tokens) // 1024}k" if tokens and int(tokens) % 1024 == 0 else f"{int(tokens):,}"


def _number_label(value: float, _position: int | None) -> str:
    return f"{value:g}"
