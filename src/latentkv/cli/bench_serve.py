"""`latentkv bench serve`: any OpenAI-compatible server under load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from latentkv.cli.bench_options import MeasureOptions, require_folder
from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.option_types import Flag, Floats, Numbers

if TYPE_CHECKING:
    from latentkv.bench.load.load import Level
    from latentkv.bench.load.run import ServeOptions, ServeReport
    from latentkv.bench.load.workload import Workload

ALL_FAILED, INTERRUPTED = 1, 130
_CONCURRENCY = (1, 4, 16)


def _json_object(text: str) -> dict[str, Any]:
    import json

    from latentkv.errors import RequestError

    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(f'{text!r} is no JSON object; write for example {{"temperature": 1}}.')
    return cast("dict[str, Any]", value)


def serve(
    url: str,
    /,
    *,
    model: Annotated[str | None, Flag(("--model", "-m"))] = None,
    api_key: Annotated[str | None, Flag(envvar="OPENAI_API_KEY")] = None,
    endpoint: str = "completions",
    concurrency: Numbers | None = None,
    rate: Floats | None = None,
    burstiness: float = 1.0,
    requests: int | None = None,
    duration: float | None = None,
    warmup: int = 1,
    prompt_tokens: str = "256",
    output_tokens: str = "64",
    shared_prefix: int = 0,
    text: Annotated[Path | None, Flag(metavar="FILE")] = None,
    chars_per_token: float | None = None,
    seed: int = 0,
    ignore_eos: bool = True,
    body: Annotated[Mapping[str, Any] | None, Flag(read=_json_object, metavar="JSON")] = None,
    timeout: float = 600.0,
    slo: str | None = None,
    measure: Annotated[MeasureOptions, Preset("repeats", "threads")],
) -> None:
    """Put any OpenAI-compatible server under load: throughput, latency percentiles, errors.

    Ctrl-C ends it with what was measured so far. The exit code is 1 if every request failed.

    Example: latentkv bench serve http://127.0.0.1:8000 --concurrency 1,8,32 --prompt-tokens 512 --output-tokens 128

    Args:
        url: the server's address, such as http://127.0.0.1:8000.
        model: name of the model, as the server calls it; None is the only one it lists.
        api_key: sent as a bearer token.
        endpoint: completions or chat.
        concurrency: requests at a time, with commas between; each is a level; None is 1,4,16.
        rate: instead: requests a second, however many are under way; with commas between.
        burstiness: spread of arrivals at a rate: 1 is Poisson, less is burstier, more is steadier.
        requests: requests of each level; None is 4 x concurrency, at least 16, or 64 at a rate.
        duration: seconds after which a level sends no more; those under way end.
        warmup: requests before each level that are not counted.
        prompt_tokens: lengths of prompts: 512, 64-512, normal:MEAN,SD or lognormal:MEAN,SD.
        output_tokens: likewise, to generate.
        shared_prefix: tokens in front of every prompt that are the same in all.
        text: text to cut prompts from; None is common words.
        chars_per_token: characters a token, to cut prompts by; None is measured with two requests.
        seed: same seed, same requests.
        ignore_eos: ask for exactly `output_tokens`, from servers that take ignore_eos.
        body: fields for every request, such as {"temperature": 1}.
        timeout: seconds that a request may take.
        slo: objectives to count goodput by, such as ttft=1s,itl=200ms.
        measure: where the numbers go.
    """
    from latentkv.bench.load.lengths import parse_lengths
    from latentkv.bench.load.run import ServeOptions
    from latentkv.bench.load.slo import parse_slo
    from latentkv.bench.load.text import generated_text, read_text
    from latentkv.bench.load.workload import Workload

    require_folder(measure.json_file, measure.plot)
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
        extra_body=body or {},
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
    measure.save(report)
    if measure.plot is not None:
        from latentkv.bench.load.plot import plot_serve

        plot_serve(report, measure.plot)
        console().print(f"Plot in {measure.plot}")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(level.completed for level in report.levels):
        raise typer.Exit(ALL_FAILED)


def _levels(concurrency: Sequence[int] | None, rate: Sequence[float] | None, burstiness: float) -> list[Level]:
    from latentkv.bench.load.load import Level
    from latentkv.errors import RequestError

    if rate is None:
        return [Level(concurrency=clients) for clients in concurrency or _CONCURRENCY]
    if concurrency is not None:
        raise RequestError("--concurrency and --rate exclude each other; give one of them.")
    return [Level(rate=each, burstiness=burstiness) for each in rate]


def _measure(options: ServeOptions, workload: Workload) -> ServeReport:
    """Measure, with a bar on a terminal that says how far the level is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from latentkv.bench.load.run import LoadProgress, measure_serve

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
    from latentkv.bench.load.report import SERVE_NOTES, describe_load, latency_table, serve_remarks, throughput_table

    screen = console()
    screen.print(throughput_table(report))
    screen.print(latency_table(report))
    for remark in serve_remarks(report):
        screen.print(remark, markup=False)
    screen.print(SERVE_NOTES, style="dim")
    screen.print(describe_load(report), style="dim", markup=False)
