"""What the benchmarks' commands have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.option_types import Flag
from latentkv.options import ParallelOptions, SchedulerOptions, SpeculationOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SHARED = (SpeculationOptions, SchedulerOptions, ParallelOptions)
ONE_MODEL = Preset("device", *(field.name for options in _SHARED for field in fields(options)))
"""Of `LLMOptions`, for what is measured: one process that computes on CPUs, without drafts."""
JsonFile = Annotated[Path | None, Flag(("--json",), metavar="FILE")]
PlotFile = Annotated[Path | None, Flag(metavar="FILE.png")]


@dataclass(frozen=True)
class MeasureOptions:
    """How a benchmark measures, and where its numbers go.

    Attributes:
        repeats: timed rounds; medians are reported.
        threads: CPU threads that compute; None is torch's own number.
        json_file: write every number as JSON.
    """

    _: KW_ONLY
    repeats: int = 9
    threads: int | None = None
    json_file: JsonFile = None

    def require_folder(self, *files: Path | None) -> None:
        """Find out before measuring, not after, that a result has nowhere to go."""
        require_folder(self.json_file, *files)

    def save(self, report: DataclassInstance) -> None:
        """Write every number of a report, where that was asked for."""
        save(report, self.json_file)


def require_folder(*files: Path | None) -> None:
    """Find out before measuring, not after, that a result has nowhere to go."""
    from latentkv.errors import RequestError

    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise RequestError(
                f"{file.parent} is not a folder, so {file.name} cannot be written there; create it first."
            )


def save(report: DataclassInstance, json_file: Path | None) -> None:
    """Write every number of a report, where that was asked for."""
    if json_file is not None:
        from dataclasses import asdict

        from latentkv.files import write_json

        write_json(json_file, asdict(report))
        console().print(f"Numbers in {json_file}")
