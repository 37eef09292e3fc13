"""What the benchmarks' commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

from latentkv.cli.flags import Preset
from latentkv.cli.terminal import console
from latentkv.option_types import Flag
from latentkv.options import ParallelOptions, SchedulerOptions, SpeculationOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import RenderableType

    from latentkv.bench.environment import Environment

    class Report(DataclassInstance, Protocol):
        """What was measured, and where."""

        @property
        def environment(self) -> Environment:
            """The machine."""
            ...


R = TypeVar("R", bound="Report")

_SHARED = (SpeculationOptions, SchedulerOptions, ParallelOptions)
ONE_MODEL = Preset("device", *(field.name for options in _SHARED for field in fields(options)))
"""Of `LLMOptions`, for what is measured: one process that computes on CPUs, without drafts."""


@dataclass(frozen=True)
class MeasureOptions:
    """How a benchmark measures, and where its numbers go.

    Attributes:
        repeats: timed rounds; medians are reported.
        threads: CPU threads that compute; None is torch's own number.
        json_file: write every number as JSON.
        plot: draw the numbers.
    """

    _: KW_ONLY
    repeats: int = 9
    threads: int | None = None
    json_file: Annotated[Path | None, Flag(("--json",), metavar="FILE")] = None
    plot: Annotated[Path | None, Flag(metavar="FILE.png")] = None

    @contextmanager
    def measuring(self, what: str) -> Generator[Callable[[str], None]]:
        """Say on a terminal what is being done; gives what to call with it.

        Raises:
            RequestError: a result has nowhere to go; which shows before measuring, not after.
        """
        require_folder(self.json_file, self.plot)
        with console(stderr=True).status(what) as status:
            yield status.update

    def show(
        self, report: R, *parts: RenderableType, notes: str = "", draw: Callable[[R, Path], object] | None = None
    ) -> None:
        """Print tables, what to know of them and of this machine, and write the files that were asked for."""
        from latentkv.bench.report import describe

        screen = console()
        for part in parts:
            screen.print(part)
        for dim in (notes, describe(report.environment)):
            if dim:
                screen.print(dim, style="dim")
        self.save(report)
        if self.plot is not None and draw is not None:
            draw(report, self.plot)
            screen.print(f"Plot in {self.plot}")

    def save(self, report: DataclassInstance) -> None:
        """Write every number, where that was asked for."""
        if self.json_file is not None:
            from latentkv.files import write_json

            write_json(self.json_file, asdict(report))
            console().print(f"Numbers in {self.json_file}")


def require_folder(*files: Path | None) -> None:
    """Find out before measuring, not after, that a result has nowhere to go."""
    from latentkv.errors import RequestError

    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise RequestError(
                f"{file.parent} is not a folder, so {file.name} cannot be written there; create it first."
            )
