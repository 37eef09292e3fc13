"""`latentkv bench server-cost`: what serving costs beside `LLM.generate`."""

from __future__ import annotations

from typing import Annotated

from latentkv.cli.bench_options import ONE_MODEL, MeasureOptions
from latentkv.cli.flags import Preset, as_words
from latentkv.option_types import Numbers
from latentkv.options import LLMOptions
from latentkv.ranges import Range


def server_cost(
    options: Annotated[LLMOptions, ONE_MODEL],
    /,
    *,
    concurrency: Numbers = (1, 8),
    new_tokens: Annotated[int, Range(1)] = 128,
    measure: Annotated[MeasureOptions, Preset("threads", "plot", repeats=14)],
) -> None:
    """Measure what is left of LLM.generate's tokens a second when the same model is served and its answers streamed.

    Both in turn: `LLM.generate` in this process, `latentkv serve` in another, its client in this one; greedy. The last
    column is what the server's event loop takes of a core for a token, requests included (on Linux).

    Example: latentkv bench server-cost --concurrency 1,8,32

    Args:
        options: the model.
        concurrency: requests at once, with commas between.
        new_tokens: tokens of a completion.
        measure: how it is measured.
    """
    from rich.table import Table

    from latentkv.bench.load.server_cost import measure_server_cost

    with measure.measuring("loading the model") as progress:
        report = measure_server_cost(
            options,
            arguments=as_words(options),
            concurrency=concurrency,
            new_tokens=new_tokens,
            rounds=measure.repeats,
            progress=progress,
        )
    title = f"Tokens a second of {report.model}: medians of {report.rounds} rounds of {report.new_tokens} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("at once", "LLM.generate", "+-", "served", "+-", "of LLM.generate", "loop, ms/token"):
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(
            str(row.concurrency),
            f"{row.generate:,.0f}",
            f"{row.generate_spread:.0%}",
            f"{row.served:,.0f}",
            f"{row.served_spread:.0%}",
            f"{row.share:.2f}",
            "" if row.loop_ms is None else f"{row.loop_ms:.3f}",
        )
    measure.show(report, table)
