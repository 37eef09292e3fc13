"""`latentkv compare`: the same decoder with MHA, GQA, MQA and MLA, trained alike and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.loading import use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.compare import CompareOptions
from latentkv.option_types import Flag

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.compare import Report


def compare(
    data: Annotated[Path, Flag(exists=True)],
    eval_file: Annotated[tuple[Path, ...], Flag(exists=True)],
    out: Path,
    *,
    options: CompareOptions,
    no_speed: bool = False,
    threads: int | None = None,
    trust_network: bool = False,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Train one small decoder with MHA, GQA, MQA and MLA, and compare loss and cache.

    Same data order for the same seed, same tokens, as many parameters, a learning rate chosen for each arm. An
    interrupted comparison goes on when the same command is given again.

    Example: latentkv compare --data books --eval-file books/dracula.txt --out comparison

    Args:
        data: folder of .txt files, or one text file.
        eval_file: text to measure on, held out of training and tokenizer; repeatable.
        out: folder for results and models; goes on with what it holds.
        options: what is compared, and how.
        no_speed: do not time the trained models' decoding.
        threads: CPU threads; None is all cores.
        trust_network: let processes talk over addresses that are not private, in the clear.
        as_json: print the report as JSON.
    """
    from latentkv.compare import compare_attention
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    err = console(stderr=True)
    with ranks.together():
        report = compare_attention(data, eval_file, out, options, err, speed=not no_speed, ranks=ranks)
        ranks.leave()
    if report is None:
        err.print("Stopped and saved. The same command goes on from there.")
        raise typer.Exit(130)
    if not ranks.is_first:
        return
    if as_json:
        print_json(report.as_json())
    else:
        _print(report, out)


def _print(report: Report, out: Path) -> None:
    from latentkv.compare import PLOT_FILE, REPORT_FILE, TABLE_FILE
    from latentkv.compare.table import notes, result_rows, sweep_rows, sweep_title

    screen = console()
    screen.print(_table(result_rows(report)))
    for note in notes(report):
        screen.print(note)
    if rows := sweep_rows(report):
        screen.print(f"{sweep_title(report)}:")
        screen.print(_table(rows))
    screen.print(f"All figures in {out / REPORT_FILE}, tables in {out / TABLE_FILE}, picture in {out / PLOT_FILE}")


def _table(rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    head, *body = rows
    table = Table()
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in body:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table
