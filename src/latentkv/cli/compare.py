"""`latentkv compare`: the same decoder with MHA, GQA, MQA and MLA, trained alike and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latentkv.cli.options import ThreadsOption, TrustNetworkOption, use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.compare import Report
    from latentkv.compare.options import Match


def compare(
    data: Annotated[Path, typer.Option(help="Folder of .txt files, or one text file.", exists=True)],
    eval_file: Annotated[
        list[Path],
        typer.Option(help="Text to measure on, held out of training and tokenizer; repeatable.", exists=True),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results and models. Goes on with what it holds.")],
    arms: Annotated[
        str | None,
        typer.Option(
            help="mha, gqa-GROUPS, mqa and mla-RANK, with commas between.",
            show_default="mha, gqa and mqa, and mla with as large a cache as these and with 1/16 of mha's",
        ),
    ] = None,
    match: Annotated[
        str, typer.Option(help="parameters: as many in each arm, by the feed-forward layer's width; none: one width.")
    ] = "parameters",
    seeds: Annotated[int, typer.Option(help="Full runs an arm.")] = 3,
    steps: Annotated[int, typer.Option(help="Of a full run; a third of it to choose a learning rate.")] = 960,
    lrs: Annotated[
        str, typer.Option(help="Peak learning rates to choose from, each arm by itself.")
    ] = "1e-3,2e-3,4e-3",
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads a layer.")] = 8,
    vocab: Annotated[int, typer.Option(help="Tokens of the tokenizer, which is trained once for all arms.")] = 1024,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 1024,
    eval_bytes: Annotated[int, typer.Option(help="About how much held-out text to measure on.")] = 200_000,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not time the trained models' decoding.")] = False,
    threads: ThreadsOption = None,
    trust_network: TrustNetworkOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train one small decoder with MHA, GQA, MQA and MLA, and compare loss and cache.

    Same data order for the same seed, same tokens, as many parameters, a learning rate chosen for each arm. An
    interrupted comparison goes on when the same command is given again.

    Example: latentkv compare --data books --eval-file books/dracula.txt --out comparison
    """
    from latentkv.compare import CompareOptions, Sizes, compare_attention
    from latentkv.train.ranks import DataRanks

    ranks = DataRanks.join(trust_network=trust_network)
    use_threads(threads)
    options = CompareOptions(
        sizes=Sizes(hidden, layers, heads, vocab),
        arms=() if arms is None else tuple(name.strip() for name in arms.split(",")),
        match=cast("Match", match),
        seeds=seeds,
        steps=steps,
        rates=_rates(lrs),
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        eval_bytes=eval_bytes,
    )
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


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--lrs={text} is not a list of numbers: write them as 1e-3,2e-3,4e-3.") from None


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
