"""`latentkv bench parallel`: a pipeline of many stages, simulated beside what `plan --ranks` computes."""

from __future__ import annotations

from typing import Annotated

from latentkv.cli.bench_options import MeasureOptions
from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.option_types import Numbers, Words


def parallel(
    *,
    ranks: Numbers = (1, 2, 4, 8, 16),
    batch: Numbers = (1, 8, 32),
    network: Words = ("10Gb:60us", "1Gb:2000us"),
    measure: Annotated[MeasureOptions, Preset("repeats", "plot")],
) -> None:
    """Simulate a pipeline: the real engine and stages of a small model, with the times of a large one.

    Each rank has a clock of its own, on which reading its weights and each message take as long as they would; nobody
    waits, so this machine's speed does not matter. The last column is the simulation over what the plan computes.

    Example: latentkv bench parallel --ranks 2,4 --batch 32

    Args:
        ranks: numbers of ranks, with commas between.
        batch: sequences at once, likewise.
        network: networks, likewise: 10Gb, or 10Gb:50us.
        measure: on how many threads, and where the numbers go.
    """
    from rich.table import Table

    from latentkv.bench.models.parallel import simulate
    from latentkv.bench.timing import torch_threads

    with measure.measuring("simulating"), torch_threads(measure.threads):
        report = simulate(ranks=ranks, batches=batch, networks=network)
    table = Table(title="Tokens a second of a model that takes 100 ms to read", title_justify="left")
    for column in ("ranks", "sequences", "network", "simulated", "planned", "ratio"):
        table.add_column(column, justify="right")
    for row in report.rows:
        shown = (f"{row.simulated:,.1f}", f"{row.planned:,.1f}", f"{row.ratio:.2f}")
        table.add_row(str(row.ranks), str(row.batch), row.network, *shown)
    console().print(table)
    measure.save(report)
