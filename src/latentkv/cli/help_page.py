"""docs/help.md: every command's help as one page. `python -m latentkv.cli.help_page > docs/help.md` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from latentkv.cli.app import COMMANDS, make_app

TITLE = """# Every command and its options

What `--help` says, on one page. `python -m latentkv.cli.help_page > docs/help.md` writes it anew.
"""


def help_page() -> str:
    """The page, in Markdown."""
    root: Any = typer.main.get_command(make_app(COMMANDS))
    return TITLE + "".join(_sections(root, ["latentkv"]))


def _sections(command: Any, path: list[str]) -> Iterator[str]:
    """A command and those below it; commands are untyped as in `cli.app`."""
    context = typer.Context(command, info_name=" ".join(path))
    arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not _of_every_command(each)]
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", command.help or "", flags=re.MULTILINE)
    yield f"\n## {' '.join(path)}\n\n{text}\n"
    if arguments:
        yield "\n" + "\n".join(arguments) + "\n"
    headings = dict.fromkeys(getattr(option, "rich_help_panel", None) for option in options)
    for heading in headings:
        lines = [_option(each, context) for each in options if each.rich_help_panel == heading]
        yield f"\n{heading or 'Options'}:\n\n" + "\n".join(lines) + "\n"
    for name, below in getattr(command, "commands", {}).items():
        yield from _sections(below, [*path, name])


def _of_every_command(option: Any) -> bool:
    return option.name in ("help", "install_completion", "show_completion")


def _argument(argument: Any) -> str:
    return f"- `{argument.metavar or argument.name.upper()}`: {argument.help}"


def _option(option: Any, context: typer.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else f" {option.metavar or _type(option, context)}"
    limits = _limits(option.min, option.max)
    shown = option.show_default if isinstance(option.show_default, str) else None if option.is_flag else option.default
    default = "" if shown in (None, ()) else f" Default: {shown}."
    return f"- {names}{kind}{limits}: {option.help}{default}"


def _type(option: Any, context: typer.Context) -> str:
    """Its name, without what typer adds for ranges and repeated options."""
    shown = option.display_type(context).strip("<>").removesuffix(" range")
    return shown.removeprefix("list[").removesuffix("]").lower()


def _limits(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    return f", at least {low:,}" if high is None else f", {low:,} to {high:,}"


if __name__ == "__main__":
    print(help_page(), end="")
