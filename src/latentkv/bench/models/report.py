"""The measurement of a model as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from rich.table import Table

from latentkv.bench.models.model import LATENTKV, ModelReport, ModelRow
from latentkv.bench.plot import tokens_label
from latentkv.bench.report import CEILING_NOTES, describe
from latentkv.files import write_whole
from latentkv.sizes import format_bytes

MODEL_NOTES = (
    "tok/s: median ± half the interquartile range, contenders timed in turn; 'once': a single round took too long. "
    "FLOPs are those of the cheaper form of latent attention; of read ceiling: the weights and the cache that a step "
    "reads. " + CEILING_NOTES
)
# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")


def model_table(report: ModelReport) -> Table:
    """A section for each prompt and depth."""
    table = Table(
        title=f"{report.model}: {report.parameters:,} parameters, {report.weights} weights, {report.kv_dtype} cache"
    )
    table.add_column("case")
    table.add_column("contender", no_wrap=True)
    for title in ("tok/s", "ms", "of product ceiling", "of read ceiling", "slower"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        following = report.rows[index + 1 : index + 2]
        last = not following or _case(following[0]) != _case(row)
        spread = f"± {row.spread / 2:.0%}" if row.samples > 1 else "once"
        table.add_row(
            _case(row),
            row.contender,
            f"{row.tokens_per_second:,.1f} {spread}",
            f"{row.ms:,.2f}",
            f"{row.of_bf16_ceiling:.1%}",
            "" if row.of_read_ceiling is None else f"{row.of_read_ceiling:.1%}",
            f"{row.times_slower:.2f}x",
            style="bold" if row.contender == LATENTKV else None,
            end_section=last,
        )
    return table


def _case(row: ModelRow) -> str:
    if row.phase == "prefill":
        return f"prompt of {row.tokens:,}"
    return f"decode at {row.tokens:,}" + (f", {row.sequences} together" if row.sequences > 1 else "")


def model_facts(report: ModelReport) -> str:
    """Lines: memory, what is not kernels, how well the contenders agree, what is missing."""
    mha = report.mha_cache_bytes_per_token
    lines = [
        f"Peak memory of the process {format_bytes(report.peak_rss_bytes)} (before any peer was loaded); "
        f"cache allocated {format_bytes(report.allocated_cache_bytes)}, {report.cache_bytes_per_token:,} B a token"
        + (f" (multi-head attention: {mha:,} B)." if mha else "."),
        f"Decoding a token reads {format_bytes(report.weight_bytes_read)} of weights."
        + (
            ""
            if report.outside_kernels_ms is None
            else f" Of a step at the smallest depth, {report.outside_kernels_ms:.2f} ms "
            f"({report.outside_kernels_share:.1%}) are not kernels."
        ),
        *(f"Logits of {name} against LatentKV's: cosine {value:.4f}." for name, value in report.agreement.items()),
        *report.notes,
    ]
    return "\n".join(lines)


def plot_decode(reports: Sequence[ModelReport], path: Path) -> None:
    """Decode speed against depth, one line for each contender of each report; PNG, whole or absent."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depths = sorted({row.tokens for report in reports for row in report.rows if row.phase == "decode"})
    contenders = list(dict.fromkeys(row.contender for report in reports for row in report.rows))
    alone = min((row.sequences for report in reports for row in report.rows if row.phase == "decode"), default=1)
    for report, line in zip(reports, ("-", "--", ":", "-.") * len(reports), strict=False):
        for index, name in enumerate(contenders):
            points = [
                (depths.index(row.tokens), row.tokens_per_second)
                for row in report.rows
                if row.phase == "decode" and row.contender == name and row.sequences == alone
            ]
            if points:
                label = f"{name}, {report.weights}" if len(reports) > 1 else name
                color = _COLORS[index % len(_COLORS)]
                axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker="o", linewidth=2, label=label)
    axes.set(xlabel="tokens in the cache", ylabel="tokens a second", yscale="log")
    axes.set_xticks(range(len(depths)), [tokens_label(depth) for depth in depths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    first = reports[0]
    axes.set_title(f"Decoding with {first.model}, batch {alone}", loc="left")
    figure.supxlabel(describe(first.environment), fontsize=7, color="#666666")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))
