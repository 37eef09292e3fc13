"""`latentkv list`: the models of the hub's cache that can be run."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from latentkv.cli.terminal import console, note, print_json
from latentkv.option_types import Flag


def list(*, as_json: Annotated[bool, Flag(("--json",))] = False) -> None:
    """List the models in the Hugging Face hub's cache that can be run, with their sizes.

    Each is run by its name, as in: latentkv chat -m org/name; a GGUF file by its path, which --json shows.

    Args:
        as_json: print JSON, sizes in bytes, times in seconds since 1970.
    """
    from latentkv.checkpoint.hub import cache_folder
    from latentkv.cli.cached_models import model_repositories, runnable, scan

    folder = cache_folder()
    repositories = model_repositories(scan(folder))
    by_repository = [[*runnable(repository)] for repository in repositories]
    models = [model for models in by_repository for model in models]
    if as_json:
        print_json([asdict(model) for model in models])
        return
    others = sum(not models for models in by_repository)
    said = f"; {others} that cannot be run, or {'are' if others > 1 else 'is'} not whole, left out" if others else ""
    if not models:
        note(f"no model that can be run is in {folder}{said}: latentkv pull org/name fetches one")
        return
    from rich.table import Table
    from rich.text import Text

    from latentkv.sizes import format_bytes

    table = Table("name", "file", "type", "weights")
    table.add_column("size", justify="right")
    table.add_column("last used")
    for model in models:
        path = Path(model.path)
        table.add_row(
            Text(model.name),
            Text("" if path.is_dir() else path.name),
            model.model_type,
            model.weights,
            format_bytes(model.bytes),
            time.strftime("%Y-%m-%d", time.localtime(model.last_used)),
        )
    console().print(table)
    note(f"{folder}{said}")
