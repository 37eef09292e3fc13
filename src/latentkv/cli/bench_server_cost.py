"""`latentkv bench server-cost`: what serving costs beside `LLM.generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from latentkv.cli.bench_options import JsonFile, Repeats, numbers, require_folder, save
from latentkv.cli.terminal import console


def server_cost(
    model: Annotated[
        str | None, typer.Argument(help="A folder or a repo id.", show_default="the embedded model")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, with commas between.")] = "1,8",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion.")] = 128,
    repeats: Repeats = 14,
    json_file: JsonFile = None,
) -> None:
    """Measure what is left of LLM.generate's tokens a second when the same model is served and its answers streamed.

    Both in turn: `LLM.generate` in this process, `latentkv serve` in another, its client in this one; greedy. The last
    column is what the server's event loop takes of a core for a token, requests included (on Linux).

    Example: latentkv bench server-cost --concurrency 1,8,32
    """
    from rich.table import Table

    from latentkv.bench.report import describe
    from latentkv.bench.server_cost import measure_server_cost

    require_folder(json_file)
    levels = numbers(concurrency)
    with console(stderr=True).status("loading the model") as status:
        report = measure_server_cost(
            model, concurrency=levels, new_tokens=new_tokens, rounds=repeats, progress=status.update
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
    screen = console()
    screen.print(table)
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)
