"""`latentkv bench speculation`: what drafts bring."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from latentkv.cli.bench_options import ONE_MODEL, MeasureOptions
from latentkv.cli.flags import Preset
from latentkv.cli.loading import load_here
from latentkv.option_types import Floats
from latentkv.options import LLMOptions
from latentkv.ranges import Range


def speculation(
    options: Annotated[LLMOptions, ONE_MODEL],
    /,
    measure: Annotated[MeasureOptions, Preset("threads", "plot", repeats=5)],
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
    from latentkv.bench.models.speculation import measure_speculation
    from latentkv.bench.models.speculation_report import SPECULATION_NOTES, speculation_table
    from latentkv.checkpoint.source import model_name

    options = replace(options, max_context=options.max_context or new_tokens + 256)
    with measure.measuring("loading the model") as progress:
        report = measure_speculation(
            load_here(options),
            name=model_name(options.model) if options.model else "the embedded model",
            speculate=speculate,
            new_tokens=new_tokens,
            temperatures=temperatures,
            repeats=measure.repeats,
            threads=options.threads,
            progress=progress,
        )
    measure.show(report, speculation_table(report), notes=SPECULATION_NOTES)
