"""A server's measurement as tables and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from latentkv.bench.load.measures import LevelResult, Percentiles
    from latentkv.bench.load.run import ServeReport

SERVE_NOTES = (
    "n: requests answered whole; tok/s and latencies are theirs alone. TTFT: from when a request was due to its first "
    "text. ITL: gaps between chunks. TPOT: from the first chunk to the last, over the tokens but one. E2E: from due to "
    "the end."
)
_FEW_FOR_P99 = 100
_BUSY_CLIENT = 0.7
_LATE_MS = 50.0
_LATENCIES = (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("TPOT", "tpot_ms"), ("E2E", "e2e_ms"))


def level_name(level: LevelResult) -> str:
    """The load of a level, short."""
    return f"{level.rate:g}/s" if level.rate is not None else f"{level.concurrency}"


def load_title(report: ServeReport) -> str:
    """What was loaded with: the column of the levels, and the axis of the plot."""
    return "rate" if any(level.rate is not None for level in report.levels) else "concurrency"


def throughput_table(report: ServeReport) -> Table:
    """A row for each level: how much."""
    table = Table(title=Text(f"{report.model} at {report.url}"))
    titles = [load_title(report), "n", "errors", "requests/s", "output tok/s", "total tok/s", "tokens in", "tokens out"]
    goodput = any(level.goodput for level in report.levels)
    for title in [*titles, *(["good/s", "good"] if goodput else [])]:
        table.add_column(title, justify="right")
    for level in report.levels:
        good = level.goodput
        table.add_row(
            level_name(level),
            f"{level.completed:,}",
            f"{level.failed:,}",
            f"{level.requests_per_second:,.2f}",
            f"{level.output_tokens_per_second:,.1f}",
            _number(level.total_tokens_per_second),
            _number(level.mean_prompt_tokens),
            _number(level.mean_output_tokens),
            *([f"{good.requests_per_second:,.2f}", f"{good.share:.0%}"] if good else []),
            style="red" if level.errors else None,
        )
    return table


def latency_table(report: ServeReport) -> Table:
    """A section for each level: how long."""
    table = Table(title="Latency in milliseconds")
    table.add_column(load_title(report), justify="right")
    table.add_column("of")
    for title in ("p50", "p90", "p99", "mean", "n"):
        table.add_column(title, justify="right")
    for level in report.levels:
        for label, name in _LATENCIES:
            sample: Percentiles | None = getattr(level, name)
            cells = (
                ["", "", "", "", "0"]
                if sample is None
                else [*(_ms(x) for x in (sample.p50, sample.p90, sample.p99, sample.mean)), f"{sample.n:,}"]
            )
            table.add_row(level_name(level), label, *cells, end_section=name == _LATENCIES[-1][1])
    return table


def serve_remarks(report: ServeReport) -> list[str]:
    """Sentences that the numbers must not be read without: errors, few samples, a busy client."""
    remarks = [
        f"{load_title(report)} {level_name(level)}: {error.count:,} x {error.kind} ({error.example})"
        for level in report.levels
        for error in level.errors
    ]
    if report.interrupted:
        cut_off = report.levels[-1].unfinished
        remarks.append(f"Interrupted: this is what was measured until then; {cut_off:,} requests were cut off.")
    few = [level_name(level) for level in report.levels if level.completed < _FEW_FOR_P99]
    if few:
        remarks.append(f"p99 of fewer than {_FEW_FOR_P99} requests is little else than the slowest ({', '.join(few)}).")
    for level in report.levels:
        at = f"{load_title(report)} {level_name(level)}"
        if level.client_share > _BUSY_CLIENT:
            remarks.append(f"{at}: the client used {level.client_share:.0%} of a core, so it may be what was measured.")
        if level.latest_ms > _LATE_MS:
            remarks.append(f"{at}: a request was sent {level.latest_ms:,.0f} ms late; latencies count the delay.")
        if level.cached_share:
            remarks.append(f"{at}: the server had {level.cached_share:.0%} of the prompts' tokens cached.")
    return [*remarks, *report.notes]


def describe_load(report: ServeReport) -> str:
    """One line: what was asked, and from where."""
    asked = ", ".join(f"{name} {value}" for name, value in report.workload.items())
    load = f", load {report.client_load_before:g} before" if report.client_load_before > 1 else ""
    return (
        f"/v1/{'chat/' if report.endpoint == 'chat' else ''}completions, {asked}; client on {report.client_cpu}{load}"
    )


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}"


def _ms(value: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
