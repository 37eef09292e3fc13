"""`latentkv evaluate`: what a model expects of held-out text, and what it answers where the answer is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.flags import Preset
from latentkv.cli.loading import load_model, use_threads
from latentkv.cli.run_facts import run_facts
from latentkv.cli.terminal import console, note, print_json, progress
from latentkv.errors import RequestError
from latentkv.evaluate import EvaluateOptions
from latentkv.option_types import Flag
from latentkv.options import LLMOptions
from latentkv.sizes import format_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from latentkv.evaluate import Evaluated, Report
    from latentkv.evaluate.report import TaskReport

_OWN = ("weights", "lora", "activations", "kv_dtype", "int8_products")
"""What changes a model's figures: `--against` is loaded without them."""

Model = Annotated[LLMOptions, Preset("cache_dir", "cache_dir_bytes", "generation_config")]


def evaluate(
    options: Model,
    /,
    measured: EvaluateOptions,
    *,
    text: Annotated[tuple[Path, ...], Flag(exists=True, file=True)],
    against: str | None = None,
    out: Path | None = None,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Measure how good a model is: on held-out text, and on questions whose answers are known.

    Of text: perplexity and bits a byte, with standard errors. Questions (greedy, exact match): copy a sentence, add
    numbers, end a paragraph, and look up a line hidden in a long prompt, by length and depth. With --against all of it
    for another model as well, and differences of pairs: what quantising, converting or a smaller cache cost.

    Example: latentkv evaluate path/to/model --text book.txt --out evaluation

    Example: latentkv evaluate model-int4 --against path/to/model --text book.txt --tasks none

    Args:
        options: the model.
        measured: what to measure.
        text: UTF-8 text that the model was not trained on, scored and asked about; repeatable.
        against: another model (a folder, a .gguf file, a repo id) that is asked the same: the source. It is loaded as
            its files are, without --weights, --lora, --activations, --kv-dtype and --int8-products; None is no other.
        out: folder for evaluation.json and evaluation.html; an interrupted evaluation goes on with what it holds.
        as_json: print the figures as JSON.
    """
    from latentkv.evaluate import EvaluationFolder, Text, evaluate_model

    if against is not None and options.num_ranks > 1:
        raise RequestError(
            "--against takes both models in one process: leave out --pipeline-parallel and --tensor-parallel."
        )
    use_threads(options.threads)
    folder = None if out is None else EvaluationFolder(out)
    texts = Text.read(text)
    # A model's own defaults of sampling, such as a penalty of repetition, would keep it from copying.
    options = replace(options, generation_config="none")
    model = _load(options)
    source = None
    if against is not None:
        plain = {name: getattr(LLMOptions(), name) for name in _OWN}
        source = _load(replace(options, model=against, **plain))
    try:
        with progress("Evaluate") as on_progress:
            report = evaluate_model(
                model, source, texts, measured, facts=run_facts(), folder=folder, on_progress=on_progress
            )
    except KeyboardInterrupt:
        if folder is not None:
            note(f"What was found is kept in {folder.out}: the same command goes on.")
        raise
    if as_json:
        print_json(report.as_json())
    else:
        _print(report, out)


def _load(options: LLMOptions) -> Evaluated:
    from latentkv.checkpoint.source import model_name
    from latentkv.evaluate import Evaluated

    given = {name: getattr(options, name) for name in ("dtype", *_OWN)}
    settings = {name: None if value is None else str(value) for name, value in given.items()}
    return Evaluated(load_model(options), model_name(options.model) if options.model else "latentkv", settings)


def _print(report: Report, out: Path | None) -> None:
    from latentkv.evaluate import PAGE_FILE, REPORT_FILE
    from latentkv.evaluate.wording import beside, right, text_rows

    screen = console()
    columns = ("", "model", "source", "difference") if report.source else ("", "model")
    if (text := report.text) is not None:
        title = f"{', '.join(report.texts)}: {text.model.tokens:,} tokens in windows of {report.window:,}"
        _show(screen, title, columns, text_rows(text))
    if report.tasks:
        rows = [(task.name, right(task.model), right(task.source), beside(task.pair)) for task in report.tasks]
        form = "by the chat template" if report.chat else "as plain text"
        _show(screen, f"right answers, asked {form}", columns, rows)
    for task in report.tasks:
        if task.cells:
            _show_cells(screen, task)
    for line in report.notes:
        screen.print(f"note: {line}", markup=False)
    if out is not None:
        screen.print(f"all figures and answers: {out / REPORT_FILE}, to be read in {out / PAGE_FILE}", markup=False)


def _show_cells(screen: Console, task: TaskReport) -> None:
    """Right answers by depth and length; with a source, its share after a stroke."""
    lengths = sorted({cell.length for cell in task.cells})
    depths = sorted({cell.depth for cell in task.cells})
    shown = {
        (cell.length, cell.depth): f"{cell.model.value:.0%}" + (f" / {cell.source.value:.0%}" if cell.source else "")
        for cell in task.cells
    }
    rows = [(f"{depth} %", *(shown.get((length, depth), "") for length in lengths)) for depth in depths]
    beside = ", model / source" if task.source else ""
    title = f"{task.name} by depth in the prompt and its length in tokens{beside}"
    _show(screen, title, ("", *map(format_tokens, lengths)), rows)


def _show(screen: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row[: len(columns)])
    screen.print(title, markup=False)
    screen.print(table)
