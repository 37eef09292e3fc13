"""`latentkv bench tensor-parallel`: what ranks that share layers out bring."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from latentkv.cli.bench_options import JsonFile, Repeats, require_folder, save
from latentkv.cli.terminal import console


def tensor_parallel(
    model: Annotated[str, typer.Argument(help="A folder or a repo id.")],
    ranks: Annotated[int, typer.Option(min=2, max=64, help="Processes on this machine.")] = 2,
    weights: Annotated[str | None, typer.Option(help="int8 or int4.", show_default="as they are stored")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of each process.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded after it.")] = 33,
    repeats: Repeats = 9,
    json_file: JsonFile = None,
) -> None:
    """Measure prompts and tokens of a model in several processes beside the same model in the first of them alone.

    Both in turn, the other processes waiting meanwhile. A process has as many threads either way, so the last column is
    what the further processes bring, and cannot be more than their number.

    Example: latentkv bench tensor-parallel models/v2-lite-4 --weights int4
    """
    from rich.table import Table

    from latentkv.bench.report import describe
    from latentkv.bench.tensor_parallel import measure_tensor_parallel
    from latentkv.parallel.launch import launch
    from latentkv.parallel.process import world_size

    require_folder(json_file)
    if world_size() == 1:
        raise typer.Exit(launch(ranks, sys.argv[1:], end_seconds=5))
    with console(stderr=True).status("measuring"):
        report = measure_tensor_parallel(
            model,
            ranks,
            weights=weights,
            threads=threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=repeats,
        )
    stored = f", weights in {weights}" if weights else ""
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    table = Table(title=f"{report.model}{stored}, {each}: medians of {report.rounds} rounds", title_justify="left")
    for column in ("what", "one process, ms", "+-", f"{ranks} processes, ms", "+-", "times as fast"):
        table.add_column(column, justify="right")
    named = {"prompt": f"prompt of {report.prompt_tokens} tokens", "token": "token"}
    for row in report.rows:
        one, all_ = (f"{row.one_ms:,.4g}", f"{row.one_spread:.0%}"), (f"{row.all_ms:,.4g}", f"{row.all_spread:.0%}")
        table.add_row(named[row.work], *one, *all_, f"{row.times:.2f}")
    screen = console()
    screen.print(table)
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)
