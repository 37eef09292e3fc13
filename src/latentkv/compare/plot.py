"""The comparison as a picture: held-out loss against the cache's bytes a token."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from latentkv.compare.report import ArmReport, Report
from latentkv.compare.sizes import BASELINE
from latentkv.files import write_whole

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_MLA, _HEADS = "#0072B2", "#D55E00"
_BESIDE = 1.06
"""Where the seeds' points stand beside their mean, as a factor of bytes."""


def plot_comparison(report: Report, path: Path) -> None:
    """One small point a seed, the mean with one standard deviation, each arm named; PNG, whole or absent."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = [arm for arm in report.arms if arm.losses]
    latent = [arm for arm in measured if arm.name.startswith("mla")]
    heads = [arm for arm in measured if arm not in latent]
    _draw(axes, heads, _HEADS, "keys and values of some heads (MHA, GQA, MQA)", "s", above=True)
    _draw(axes, latent, _MLA, "one latent (MLA)", "o", above=False)
    for arm in heads:
        if arm.name == BASELINE and arm.loss is not None:
            axes.axhline(arm.loss.mean, color="#999999", linewidth=1, linestyle=":", zorder=0)
    axes.set(xscale="log", xlabel="KV cache, bytes a token (all layers, bf16)", ylabel="held-out loss, nats a token")
    axes.xaxis.set_major_locator(FixedLocator(sorted({arm.cached_bytes for arm in measured})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(x=0.12, y=0.18)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=2)
    parameters = statistics.fmean(arm.parameters for arm in report.arms)
    seeds = report.options.seeds
    axes.set_title(
        f"about {parameters / 1e6:.2f} M parameters, "
        f"{report.training['tokens_of_a_run'] / 1e6:.2f} M tokens, {seeds} seed{'s' if seeds > 1 else ''}; "
        "large: mean and standard deviation; small: each seed",
        fontsize=9,
        color="#444444",
    )
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))


def _draw(axes: Axes, arms: Sequence[ArmReport], color: str, label: str, marker: str, *, above: bool) -> None:
    """One family: a line through its means, from the smallest cache to the largest."""
    arms = sorted(arms, key=lambda arm: arm.cached_bytes)
    if not arms:
        return
    caches = [arm.cached_bytes for arm in arms]
    means = [arm.loss.mean if arm.loss else 0.0 for arm in arms]
    deviations = [(arm.loss.deviation or 0.0) if arm.loss else 0.0 for arm in arms]
    axes.errorbar(caches, means, deviations, color=color, marker=marker, markersize=7, linewidth=1.5, capsize=4)
    axes.plot([], [], color=color, marker=marker, markersize=7, linewidth=1.5, label=label)
    for arm, cache in zip(arms, caches, strict=True):
        losses = list(arm.losses.values())
        beside = [cache * (_BESIDE if above else 1 / _BESIDE)] * len(losses)
        axes.scatter(beside, losses, s=18, color="white", edgecolors=color, linewidths=1.2, zorder=3)
        deviation, mean = (arm.loss.deviation or 0.0, arm.loss.mean) if arm.loss else (0.0, losses[0])
        edge = max(*losses, mean + deviation) if above else min(*losses, mean - deviation)
        axes.annotate(
            arm.name,
            (cache, edge),
            (0, 7 if above else -7),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=color,
            fontweight="bold",
        )
