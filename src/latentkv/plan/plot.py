"""The cache of several models as a picture: bytes a token, by attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from latentkv.files import write_whole
from latentkv.plan.predict import Plan

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLORS = {"MHA": "#999999", "GQA, 8 KV heads": "#009E73", "MQA": "#E69F00", "MLA": "#0072B2", "MLA, int8": "#56B4E9"}


def plot_caches(plans: Sequence[Plan], path: Path) -> None:
    """Grouped bars on a logarithmic scale, one group a model; a PNG, whole or absent."""
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(_COLORS)
    for offset, (kind, color) in enumerate(_COLORS.items()):
        sizes = [_bytes_by_kind(plan).get(kind, 0) for plan in plans]
        places = [index + (offset - (len(_COLORS) - 1) / 2) * width for index in range(len(plans))]
        axes.bar(places, sizes, width, label=kind, color=color)
    axes.set(yscale="log", ylim=(2_000, None), ylabel="KV cache, bytes a token (all layers)")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xticks(range(len(plans)), [plan.model for plan in plans], rotation=20, ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=len(_COLORS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))


def _bytes_by_kind(plan: Plan) -> dict[str, int]:
    sizes = {"MLA" if row.this_model else row.attention: row.bytes_per_token for row in plan.cache}
    return sizes | ({"MLA, int8": plan.kv_dtypes["int8"]} if "int8" in plan.kv_dtypes else {})
