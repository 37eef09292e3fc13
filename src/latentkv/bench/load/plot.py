"""A server's measurement as a picture: throughput and latency against load."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from latentkv.bench.load.measures import Percentiles
from latentkv.bench.load.report import describe_load, level_name, load_title
from latentkv.bench.load.run import ServeReport
from latentkv.files import write_whole

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_METRICS = (("TTFT", "ttft_ms", "#D55E00"), ("ITL", "itl_ms", "#0072B2"), ("E2E", "e2e_ms", "#009E73"))
_PERCENTILES = (("p50", "o", "-"), ("p90", "^", "--"), ("p99", "v", ":"))


def plot_serve(report: ServeReport, path: Path) -> None:
    """Output tokens a second, and percentiles of latency, against load; PNG, whole or absent."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    throughput, latency = figure.subplots(1, 2)
    _plot_throughput(report, throughput)
    _plot_latency(report, latency)
    for axes in (throughput, latency):
        axes.set_xticks(range(len(report.levels)), [level_name(level) for level in report.levels])
        axes.set_xlabel("requests at a time" if load_title(report) == "concurrency" else "requests sent a second")
        axes.margins(x=0.15)
        axes.grid(which="major", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.model} at {report.url}", x=0.02, ha="left", fontsize=12)
    figure.supxlabel(describe_load(report), fontsize=7, color="#666666")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))


def _plot_throughput(report: ServeReport, axes: Axes) -> None:
    speeds = [level.output_tokens_per_second for level in report.levels]
    axes.plot(range(len(speeds)), speeds, color="#0072B2", marker="o", linewidth=2)
    for index, speed in enumerate(speeds):
        axes.annotate(
            f"{speed:,.0f}",
            (index, speed),
            (0, 9),
            textcoords="offset points",
            ha="center",
            color="#0072B2",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set(ylabel="output tokens a second")
    axes.set_ylim(bottom=0, top=max(speeds, default=0) * 1.12 or 1)


def _plot_latency(report: ServeReport, axes: Axes) -> None:
    for metric, name, color in _METRICS:
        for percentile, marker, line in _PERCENTILES:
            points: list[tuple[int, float]] = []
            for index, level in enumerate(report.levels):
                sample: Percentiles | None = getattr(level, name)
                if sample is not None and getattr(sample, percentile) > 0:
                    points.append((index, getattr(sample, percentile)))
            if points:
                label = f"{metric} {percentile}"
                axes.plot(
                    *zip(*points, strict=True), color=color, marker=marker, linestyle=line, linewidth=2, label=label
                )
    axes.set(ylabel="milliseconds", yscale="log")
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if axes.lines:
        # Above the lines, wherever they run; a column for each metric.
        axes.legend(frameon=False, fontsize=8, ncols=len(_METRICS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
