"""`latentkv bench speculation`: what drafts bring."""

from __future__ import annotations

from typing import Annotated

from latentkv.cli.bench_options import MeasureOptions
from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.option_types import Floats
from latentkv.options import ModelOptions
from latentkv.ranges import Range


def speculation(
    options: Annotated[ModelOptions, Preset("device", "activations", "packed_dir", "packed_dir_bytes")],
    /,
    measure: Annotated[MeasureOptions, Preset(repeats=5)],
    *,
    speculate: Annotated[int, Range(1, 16)] = 4,
    new_tokens: Annotated[int, Range(1)] = 200,
    temperatures: Floats = (0, 0.8),
) -> None:
    """Measure how fast a model writes without drafts, with n-grams and with MTP, and how often drafts are right.

    Prose and a repetitive prompt, three completions each, one sequence at a time.

    Example: latentkv bench speculation --new-tokens 40 --repeats 1

    Args:
        options: the model.
        measure: how it is measured.
        speculate: tokens of a draft at most.
        new_tokens: tokens of a completion.
        temperatures: temperatures of sampling, with commas between.
    """
    from latentkv.bench.report import describe
    from latentkv.bench.speculation import measure_speculation
    from latentkv.bench.speculation_report import SPECULATION_NOTES, speculation_table
    from latentkv.checkpoint.source import model_name
    from latentkv.llm import LLM

    measure.require_folder()
    with console(stderr=True).status("loading the model") as status:
        report = measure_speculation(
            LLM(**vars(options), max_context=new_tokens + 256),
            name=model_name(options.model) if options.model else "the embedded model",
            speculate=speculate,
            new_tokens=new_tokens,
            temperatures=temperatures,
            repeats=measure.repeats,
            threads=measure.threads,
            progress=status.update,
        )
    screen = console()
    screen.print(speculation_table(report))
    screen.print(SPECULATION_NOTES, style="dim")
    screen.print(describe(report.environment), style="dim")
    measure.save(report)
