"""The measurement of drafts as a table."""

from __future__ import annotations

from rich.table import Table

from latentkv.bench.models.speculation import OFF, SpeculationReport

SPECULATION_NOTES = (
    "tok/s: median ± half the interquartile range, contenders timed in turn. drafted: tokens drafted for a token "
    "written. accepted: share of those that were right. a step: tokens written in a step of the model. "
    "always: whether it pays or not, with drafts of that length."
)


def speculation_table(report: SpeculationReport) -> Table:
    """A section for each case."""
    table = Table(title=f"{report.model}: {report.new_tokens} tokens, drafts of at most {report.speculate}")
    for title in ("prompt", "drafts"):
        table.add_column(title, no_wrap=True)
    for title in ("tok/s", "faster", "drafted", "accepted", "a step", "same text"):
        table.add_column(title, justify="right")
    for index, row in enumerate(report.rows):
        following = report.rows[index + 1 : index + 2]
        last = not following or (following[0].prompt, following[0].temperature) != (row.prompt, row.temperature)
        table.add_row(
            f"{row.prompt}, temperature {row.temperature:g}",
            row.drafts,
            f"{row.tokens_per_second:,.0f} ± {row.spread / 2:.0%}",
            f"{row.times_faster:.2f}x",
            f"{row.drafted:.2f}",
            "" if row.accepted is None else f"{row.accepted:.0%}",
            f"{row.tokens_per_step:.2f}",
            "yes" if row.same_text else "no",
            style="bold" if row.drafts == OFF else None,
            end_section=last,
        )
    return table
