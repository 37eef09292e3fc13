"""`latentkv bench speculation`: what drafts bring."""

from __future__ import annotations

from typing import Annotated

import typer

from latentkv.cli.bench_options import JsonFile, Repeats, Threads, require_folder, save
from latentkv.cli.options import MODEL_FORMS, DtypeOption, WeightsOption
from latentkv.cli.terminal import console


def speculation(
    model: Annotated[
        str | None, typer.Argument(help=f"The model: {MODEL_FORMS}.", show_default="the embedded model")
    ] = None,
    speculate: Annotated[int, typer.Option(min=1, max=16, help="Tokens of a draft at most.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a completion.")] = 200,
    temperatures: Annotated[str, typer.Option(help="Of sampling, with commas between.")] = "0,0.8",
    repeats: Repeats = 5,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how fast a model writes without drafts, with n-grams and with MTP, and how often drafts are right.

    Prose and a repetitive prompt, three completions each, one sequence at a time.

    Example: latentkv bench speculation --new-tokens 40 --repeats 1
    """
    from latentkv.bench.report import describe
    from latentkv.bench.speculation import measure_speculation
    from latentkv.bench.speculation_report import SPECULATION_NOTES, speculation_table
    from latentkv.checkpoint.source import model_name
    from latentkv.llm import LLM

    require_folder(json_file)
    values = _temperatures(temperatures)
    with console(stderr=True).status("loading the model") as status:
        report = measure_speculation(
            LLM(model, dtype=dtype, weights=weights, max_context=new_tokens + 256),
            name=model_name(model) if model else "the embedded model",
            speculate=speculate,
            new_tokens=new_tokens,
            temperatures=values,
            repeats=repeats,
            threads=threads,
            progress=status.update,
        )
    screen = console()
    screen.print(speculation_table(report))
    screen.print(SPECULATION_NOTES, style="dim")
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)


def _temperatures(text: str) -> list[float]:
    from latentkv.errors import RequestError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"Temperatures are numbers with commas between, such as 0,0.8, not {text!r}.") from None
