"""`latentkv quantize`: a copy of a checkpoint with int8 or int4 weights."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentkv.cli.options import MODEL_FORMS, ThreadsOption, use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.llm import Perplexity
    from latentkv.quantize import QuantizationReport


def quantize(
    source: Annotated[str, typer.Argument(help=f"The model: {MODEL_FORMS}.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="A new folder for the copy.", show_default=False)],
    weights: Annotated[str, typer.Option(help="int8, or int4 (its output head is int8).", show_default=False)],
    group: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default="int4: 128; int8: a whole row"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Report the perplexity on this text, before and after.", exists=True, dir_okay=False),
    ] = None,
    text_bytes: Annotated[int, typer.Option(help="How much of the text to read.")] = 100_000,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a copy of a checkpoint with int8 or int4 weights, in the compressed-tensors format.

    Each group's scale is searched for the least squared error. Routers, norms, embeddings and the latent projections
    (kv_a_proj_with_mqa, kv_b_proj, q_a_proj, eh_proj) stay as they are; the output head is int8, also with int4. An
    interrupted run goes on when the same command is given again.

    Example: latentkv quantize deepseek-ai/DeepSeek-V2-Lite v2-lite-int4 --weights int4
    """

    from latentkv.checkpoint.source import resolve_folder
    from latentkv.quantize import quantize_checkpoint
    from latentkv.weights.weight import require_format

    use_threads(threads)
    require_format(weights, group)
    passage = None if text is None else _passage(text, text_bytes)
    folder = resolve_folder(source)
    before = None if passage is None else _perplexity(folder, passage)
    with _progress(f"{folder.name} to {weights}") as on_progress:
        report = quantize_checkpoint(folder, target, weights, group, on_progress=on_progress)
    measured = None
    if passage is not None and before is not None:
        measured = {"text": str(text), "before": asdict(before), "after": asdict(_perplexity(target, passage))}
        _add_to_report(target, measured)
    if as_json:
        print_json(report.as_json() | {"perplexity": measured})
    else:
        _print_report(report, target, measured)


def _passage(path: Path, num_bytes: int) -> str:
    if num_bytes < 1:
        raise RequestError(f"--text-bytes must be 1 or more, not {num_bytes}.")
    with path.open("rb") as file:
        passage = file.read(num_bytes).decode("utf-8", errors="ignore")
    if not passage:
        raise RequestError(f"{path} holds no text to score: name a file of UTF-8 text.")
    return passage


def _perplexity(folder: Path, passage: str) -> Perplexity:
    from latentkv import LLM

    with console(stderr=True).status(f"Perplexity of {folder.name}"):
        return LLM(folder, packed_dir=None).perplexity(passage)


@contextmanager
def _progress(title: str) -> Generator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _add_to_report(target: Path, measured: dict[str, Any]) -> None:
    from latentkv.errors import CheckpointError
    from latentkv.files import write_json
    from latentkv.json_files import read_json
    from latentkv.quantize import REPORT_FILE

    path = target / REPORT_FILE
    write_json(path, read_json(path, CheckpointError) | {"perplexity": measured})


def _print_report(report: QuantizationReport, target: Path, measured: dict[str, Any] | None) -> None:
    from latentkv.plan.sizes import format_bytes
    from latentkv.quantize import REPORT_FILE

    out, total = console(), report.total
    out.print(_layer_table(report))
    out.print(_kind_table(report))
    if measured is not None:
        before, after = measured["before"], measured["after"]
        out.print(
            f"perplexity  {before['perplexity']:.4g} before, {after['perplexity']:.4g} after "
            f"({after['bits_per_byte'] - before['bits_per_byte']:+.4f} bits a byte; {before['tokens']:,} tokens)"
        )
    out.print(
        f"{target}: {format_bytes(total.bytes_after)}, was {format_bytes(total.bytes_before)}; "
        f"{total.bits_per_weight:.2f} bits a weight. All figures: {target / REPORT_FILE}"
    )


def _layer_table(report: QuantizationReport) -> Table:
    """Relative error of the quantised weights, a line for each layer and a column for each kind."""
    from rich.table import Table

    kinds = sorted({kind for errors in report.layer_errors.values() for kind in errors})
    table = Table(title="relative error ||W - Wq|| / ||W||, %", title_justify="left")
    for column in ("layer", *kinds):
        table.add_column(column, justify="right")
    for layer, errors in report.layer_errors.items():
        table.add_row(str(layer), *(f"{100 * errors[kind]:.2f}" if kind in errors else "" for kind in kinds))
    return table


def _kind_table(report: QuantizationReport) -> Table:
    from rich.table import Table

    from latentkv.plan.sizes import format_bytes

    table = Table("weights", "stored as")
    for column in ("tensors", "parameters", "before", "after", "bits a weight", "error, %"):
        table.add_column(column, justify="right")
    for row in report.by_kind:
        error = f"{100 * row.relative_error:.2f}" if row.squared_norm else ""
        sizes = format_bytes(row.bytes_before), format_bytes(row.bytes_after)
        counts = f"{row.tensors:,}", f"{row.parameters:,}"
        table.add_row(row.kind, row.format, *counts, *sizes, f"{row.bits_per_weight:.2f}", error)
    return table
