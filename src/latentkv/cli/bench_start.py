"""`latentkv bench start`: from the command to the first token."""

from __future__ import annotations

from typing import Annotated

from latentkv.cli.bench_options import MeasureOptions
from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.options import ModelName


def start(name: ModelName, /, *, measure: Annotated[MeasureOptions, Preset("threads", repeats=5)]) -> None:
    """Measure how long `latentkv generate` takes to the first token, packing weights anew and mapping them.

    Beside it stands `import torch`, which no start can do without; processor time is of the whole process.

    Example: latentkv bench start --repeats 9

    Args:
        name: the model.
        measure: how it is measured.
    """
    from rich.table import Table

    from latentkv.bench.report import describe
    from latentkv.bench.start import measure_start
    from latentkv.checkpoint.source import model_name

    measure.require_folder()
    model = None if name.model is None else str(name.model)
    shown = model_name(model) if model else "the embedded model"
    with console(stderr=True).status("starting") as status:
        report = measure_start(model, name=shown, repeats=measure.repeats, progress=status.update)
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
    screen = console()
    screen.print(table)
    screen.print(describe(report.environment), style="dim")
    measure.save(report)
