"""`latentkv bench serve`: any OpenAI-compatible server under load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from latentkv.cli.bench_options import JsonFile, numbers, require_folder, save
from latentkv.cli.terminal import console

if TYPE_CHECKING:
    from latentkv.bench.serve import ServeOptions, ServeReport
    from latentkv.bench.serve_load import Level
    from latentkv.bench.serve_workload import Workload

ALL_FAILED, INTERRUPTED = 1, 130
_CONCURRENCY = "1,4,16"


def serve(
    url: Annotated[str, typer.Argument(help="The server's address, such as http://127.0.0.1:8000.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As the server calls it.", show_default="the only one it lists")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    concurrency: Annotated[
        str | None,
        typer.Option(help="Requests at a time, with commas between; each is a level.", show_default=_CONCURRENCY),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Instead: requests a second, however many are under way; with commas between.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Of arrivals at a rate: 1 is Poisson, less is burstier, more is steadier.")
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(help="Of each level.", show_default="4 x concurrency, at least 16; 64 at a rate"),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds after which a level sends no more; those under way end.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Requests before each level that are not counted.")] = 1,
    prompt_tokens: Annotated[str, typer.Option(help="512, 64-512, normal:MEAN,SD or lognormal:MEAN,SD.")] = "256",
    output_tokens: Annotated[str, typer.Option(help="Likewise, to generate.")] = "64",
    shared_prefix: Annotated[int, typer.Option(help="Tokens in front of every prompt that are the same in all.")] = 0,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to cut prompts from.", show_default="common words")
    ] = None,
    chars_per_token: Annotated[
        float | None, typer.Option(help="To cut prompts by.", show_default="measured with two requests")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for exactly --output-tokens, from servers that take ignore_eos.")
    ] = True,
    body: Annotated[
        str, typer.Option(metavar="JSON", help='Fields for every request, such as {"temperature": 1}.')
    ] = "{}",
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    slo: Annotated[str | None, typer.Option(help="Objectives to count goodput by, such as ttft=1s,itl=200ms.")] = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw throughput and latency against load.")
    ] = None,
) -> None:
    """Put any OpenAI-compatible server under load: throughput, latency percentiles, errors.

    Ctrl-C ends it with what was measured so far. The exit code is 1 if every request failed.

    Example: latentkv bench serve http://127.0.0.1:8000 --concurrency 1,8,32 --prompt-tokens 512 --output-tokens 128
    """
    from latentkv.bench.serve import ServeOptions
    from latentkv.bench.serve_lengths import parse_lengths
    from latentkv.bench.serve_slo import parse_slo
    from latentkv.bench.serve_text import generated_text, read_text
    from latentkv.bench.serve_workload import Workload

    require_folder(json_file, plot)
    options = ServeOptions(
        url=url,
        levels=_levels(concurrency, rate, burstiness),
        api_key=api_key or None,
        model=model,
        endpoint=endpoint,  # pyright: ignore[reportArgumentType]  (checked by ServeOptions)
        requests=requests,
        duration=duration,
        warmup=warmup,
        timeout=timeout,
        ignore_eos=ignore_eos,
        extra_body=_json_object(body),
        characters_per_token=chars_per_token,
        slo=None if slo is None else parse_slo(slo),
    )
    workload = Workload(
        prompt_tokens=parse_lengths(prompt_tokens),
        output_tokens=parse_lengths(output_tokens),
        shared_prefix=shared_prefix,
        text=generated_text(seed) if text is None else read_text(text),
        text_name="common words" if text is None else text.name,
        seed=seed,
    )
    report = _measure(options, workload)
    _print(report)
    save(report, json_file)
    if plot is not None:
        from latentkv.bench.serve_plot import plot_serve

        plot_serve(report, plot)
        console().print(f"Plot in {plot}")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(level.completed for level in report.levels):
        raise typer.Exit(ALL_FAILED)


def _levels(concurrency: str | None, rate: str | None, burstiness: float) -> list[Level]:
    from latentkv.bench.serve_load import Level
    from latentkv.errors import RequestError

    if rate is None:
        return [Level(concurrency=clients) for clients in numbers(concurrency or _CONCURRENCY)]
    if concurrency is not None:
        raise RequestError("--concurrency and --rate exclude each other; give one of them.")
    try:
        return [Level(rate=float(part), burstiness=burstiness) for part in rate.split(",")]
    except ValueError:
        raise RequestError(f"{rate!r} is no rate; write requests a second, such as 0.5,2.") from None


def _json_object(text: str) -> dict[str, Any]:
    import json

    from latentkv.errors import RequestError

    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(f'--body takes a JSON object, such as {{"temperature": 1}}, not {text!r}.')
    return cast("dict[str, Any]", value)


def _measure(options: ServeOptions, workload: Workload) -> ServeReport:
    """Measure, with a bar on a terminal that says how far the level is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from latentkv.bench.serve import LoadProgress, measure_serve

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[ended]}"), TimeElapsedColumn())
    screen = console(stderr=True)
    # Redrawn seldom: the client's time is part of what is measured.
    with Progress(
        *columns, console=screen, transient=True, refresh_per_second=2, disable=not screen.is_terminal
    ) as bar:
        task = bar.add_task("preparing", total=None, ended="")

        def show(progress: LoadProgress) -> None:
            if bar.tasks[0].description != progress.level:
                bar.reset(task, total=1.0, description=progress.level)
            failed = f", {progress.failed} failed" if progress.failed else ""
            bar.update(task, completed=progress.share, ended=f"{progress.ended} answered{failed}")

        return measure_serve(options, workload, show)


def _print(report: ServeReport) -> None:
    from latentkv.bench.serve_report import SERVE_NOTES, describe_load, latency_table, serve_remarks, throughput_table

    screen = console()
    screen.print(throughput_table(report))
    screen.print(latency_table(report))
    for remark in serve_remarks(report):
        screen.print(remark, markup=False)
    screen.print(SERVE_NOTES, style="dim")
    screen.print(describe_load(report), style="dim", markup=False)
