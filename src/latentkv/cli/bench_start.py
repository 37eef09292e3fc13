"""`latentkv bench start`: from the command to the first token."""

from __future__ import annotations

from typing import Annotated

from latentkv.cli.bench_options import ONE_MODEL, MeasureOptions
from latentkv.cli.flags import Preset, as_words
from latentkv.options import LLMOptions


def start(
    options: Annotated[LLMOptions, ONE_MODEL, Preset("packed_dir", "packed_dir_bytes")],
    /,
    *,
    measure: Annotated[MeasureOptions, Preset("threads", "plot", repeats=5)],
) -> None:
    """Measure how long `latentkv generate` takes to the first token, packing weights anew and mapping them.

    Beside it stands `import torch`, which no start can do without; processor time is of the whole process.

    Example: latentkv bench start --repeats 9

    Args:
        options: the model.
        measure: how it is measured.
    """
    from rich.table import Table

    from latentkv.bench.models.start import measure_start
    from latentkv.checkpoint.source import model_name

    shown = model_name(options.model) if options.model else "the embedded model"
    with measure.measuring("starting") as progress:
        report = measure_start(as_words(options), name=shown, repeats=measure.repeats, progress=progress)
    torch = report.starts[0]
    table = Table(title=f"Starts of {report.model}, medians of {report.repeats}", title_justify="left")
    for column in ("", "first output after", "of import torch", "processor time", "of import torch"):
        table.add_column(column, justify="right" if column else "left")
    for each in report.starts:
        table.add_row(
            each.name,
            f"{each.seconds:.2f} s",
            f"{each.seconds / torch.seconds:.2f}x",
            f"{each.cpu_seconds:.2f} s",
            f"{each.cpu_seconds / torch.cpu_seconds:.2f}x",
        )
    measure.show(report, table)
