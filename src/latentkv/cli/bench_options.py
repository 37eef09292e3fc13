"""What the benchmarks' commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.terminal import console

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Threads = Annotated[int | None, typer.Option(help="Torch threads.", show_default="torch's own number")]
Repeats = Annotated[int, typer.Option(help="Timed rounds; medians are reported.")]
Contexts = Annotated[str, typer.Option(help="Cached tokens, with commas between.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every number as JSON.")]
KVDtype = Annotated[str, typer.Option(help="Format of LatentKV's cache: bf16, fp8, int8, fp16 or fp32.")]


def numbers(text: str) -> list[int]:
    """Numbers of tokens (or of anything) with commas between; 4k is 4096, and 0 is allowed."""
    from latentkv.plan.sizes import parse_tokens

    return [0 if part.strip() == "0" else parse_tokens(part) for part in text.split(",")]


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
