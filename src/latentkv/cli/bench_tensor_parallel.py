"""`latentkv bench tensor-parallel`: what ranks that share layers out bring."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from latentkv.cli.bench_options import ONE_MODEL, MeasureOptions, require_folder
from latentkv.cli.flags import Preset
from latentkv.options import LLMOptions
from latentkv.ranges import Range

_AS_MEASURED = Preset("max_context", "cache_dir", "cache_dir_bytes", model=..., threads=1)


def tensor_parallel(
    options: Annotated[LLMOptions, ONE_MODEL, _AS_MEASURED],
    /,
    *,
    ranks: Annotated[int, Range(2, 64)] = 2,
    prompt_tokens: Annotated[int, Range(1)] = 512,
    new_tokens: Annotated[int, Range(2)] = 33,
    measure: Annotated[MeasureOptions, Preset("threads", "plot", repeats=9)],
) -> None:
    """Measure prompts and tokens of a model in several processes beside the same model in the first of them alone.

    Both in turn, the other processes waiting meanwhile. A process has as many threads either way, so the last column is
    what the further processes bring, and cannot be more than their number.

    Example: latentkv bench tensor-parallel models/v2-lite-4 --weights int4

    Args:
        options: the model.
        ranks: processes on this machine.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens decoded after it.
        measure: how it is measured.
    """
    from rich.table import Table

    from latentkv.bench.models.tensor_parallel import measure_tensor_parallel
    from latentkv.parallel.launch import launch
    from latentkv.parallel.process import world_size

    require_folder(measure.json_file)
    if world_size() == 1:
        raise typer.Exit(launch(ranks, sys.argv[1:], end_seconds=5))
    with measure.measuring("measuring"):
        report = measure_tensor_parallel(
            options,
            ranks,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=measure.repeats,
        )
    stored = f", weights in {options.weights}" if options.weights else ""
    each = f"{report.threads} thread{'s' if report.threads > 1 else ''} each"
    table = Table(title=f"{report.model}{stored}, {each}: medians of {report.rounds} rounds", title_justify="left")
    for column in ("what", "one process, ms", "+-", f"{ranks} processes, ms", "+-", "times as fast"):
        table.add_column(column, justify="right")
    named = {"prompt": f"prompt of {report.prompt_tokens} tokens", "token": "token"}
    for row in report.rows:
        one, all_ = (f"{row.one_ms:,.4g}", f"{row.one_spread:.0%}"), (f"{row.all_ms:,.4g}", f"{row.all_spread:.0%}")
        table.add_row(named[row.work], *one, *all_, f"{row.times:.2f}")
    measure.show(report, table)
