"""The command line, run in this process."""

from __future__ import annotations

from functools import cache
from typing import Any

import typer
import typer.testing
from typer.testing import CliRunner, Result

from latentkv.cli.app import app_for

# To put a command and its options together takes most of a short test; it is the same whenever it is run.
typer.testing._get_command = cache(typer.testing._get_command)


@cache
def _app_for(word: str) -> typer.Typer:
    return app_for([word])


def run_here(*words: object, **options: Any) -> Result:
    """Run the command line: run_here("plan", "deepseek-v3")."""
    texts = [str(word) for word in words]
    # As `main` finds the command: the first word that is no option.
    return CliRunner().invoke(
        _app_for(next((text for text in texts if not text.startswith("-")), "")), texts, **options
    )
