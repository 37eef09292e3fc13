"""The pictures of a conversion's report, as PNG, in colours for a light or a dark page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator


@dataclass(frozen=True)
class Theme:
    """Colours; the background is the page's."""

    text: str
    faint: str
    muted: str
    grid: str
    main: str
    other: str


# Blue and orange stay apart for colour-blind readers (Okabe and Ito).
LIGHT = Theme(text="#1d2530", faint="#667080", muted="#b9c1cc", grid="#e3e7ec", main="#0072b2", other="#d55e00")
DARK = Theme(text="#e6eaf0", faint="#98a2b3", muted="#4b5667", grid="#2c3440", main="#56b4e9", other="#e69f00")


def plot_layers(layers: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """A bar a layer: the error of its attention's output."""
    figure = _figure((5.2, 2.7), theme)
    axes = _axes(figure, 1, theme)[0]
    axes.bar([row["layer"] for row in layers], [100 * row["output_error"] for row in layers], 0.7, color=theme.main)
    axes.set(xlabel="layer", ylabel="error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    return _png(figure)


def plot_sizes(forecasts: Sequence[Sequence[float]], chosen: tuple[int, int], theme: Theme) -> bytes:
    """A bar for each size that was tried: the mean error of the layers; the one that was taken stands out."""
    figure = _figure((5.2, 2.7), theme)
    axes = _axes(figure, 1, theme)[0]
    colors = [theme.main if (rank, dim) == chosen else theme.muted for rank, dim, _ in forecasts]
    axes.bar(range(len(forecasts)), [100 * error for _, _, error in forecasts], 0.7, color=colors)
    labels = [f"{rank:g} + {dim:g}" for rank, dim, _ in forecasts]
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if len(labels) > 6 else {}
    axes.set_xticks(range(len(forecasts)), labels, **turned)
    axes.set(xlabel="rank + dimensions with RoPE", ylabel="error, %")
    axes.grid(axis="x", visible=False)
    return _png(figure)


def plot_healing(
    losses: Sequence[tuple[int, float]],
    measures: Sequence[tuple[int, float, float]],
    source: float | None,
    theme: Theme,
) -> bytes:
    """KL against tokens, of the text that is trained on and of the held-out one; beside it the latter's perplexity.

    Args:
        losses: (healing tokens, KL in nats per token) of what is trained on.
        measures: (healing tokens, KL in nats per token, perplexity) of held-out text; none: the first picture alone.
        source: the source's perplexity, drawn as a line.
        theme: of the page.
    """
    figure = _figure((10.6 if measures else 5.2, 2.9), theme)
    axes = _axes(figure, 2 if measures else 1, theme)
    axes[0].plot(*zip(*losses, strict=True), color=theme.main, linewidth=1.4, label="text trained on")
    axes[0].set_ylabel("KL to the source, nats per token")
    if measures:
        tokens, divergences, perplexities = zip(*measures, strict=True)
        marked: dict[str, Any] = {"linewidth": 1.4, "marker": "o", "markersize": 4, "clip_on": False}
        axes[0].plot(tokens, divergences, color=theme.other, label="held-out text", **marked)
        axes[0].legend(frameon=False, labelcolor=theme.faint, fontsize=9)
        axes[1].plot(tokens, perplexities, color=theme.main, **marked)
        axes[1].set_ylabel("perplexity, held-out text")
        if source is not None:
            axes[1].axhline(source, color=theme.other, linewidth=1.4, linestyle="--")
            axes[1].annotate(
                f"source {source:.4g}",
                (1, source),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                color=theme.other,
                fontsize=9,
            )
            axes[1].margins(y=0.12)
    axes[0].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("healing tokens")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
    return _png(figure)


def _short(value: float, _position: int) -> str:
    """A number of tokens as matplotlib asks for it: 0, 400, 20k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _figure(size: tuple[float, float], theme: Theme) -> Figure:
    figure = Figure(figsize=size, layout="constrained", facecolor="none", edgecolor=theme.text)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, count: int, theme: Theme) -> list[Axes]:
    found: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in found:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.grid)
        axes.tick_params(colors=theme.faint, labelsize=9)
        axes.xaxis.label.set(color=theme.faint, fontsize=9)
        axes.yaxis.label.set(color=theme.faint, fontsize=9)
        axes.grid(color=theme.grid)
        axes.set_axisbelow(True)
    return found


def _png(figure: Figure) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, dpi=160, format="png")
    return held.getvalue()
