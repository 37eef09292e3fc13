"""`latentkv`: the commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentkv.cli.flags import command
from latentkv.errors import LatentKVError, RankError

USAGE_ERROR, RANK_LOST, INTERRUPTED = 2, 1, 130

COMMANDS = (
    *("generate", "chat", "serve", "run-batch", "pull", "list", "rm", "plan", "inspect", "quantize", "convert"),
    *("heal", "train", "compare", "evaluate", "doctor", "bench"),
)
"""In the order of --help; each is a function in the module of its name (with _ for -), "bench" a group of commands."""
OTHER_NAMES = {"run": "chat"}
"""Words that other programs have for a command; not in --help."""


class Commands(TyperGroup):
    """The group of commands: an error that a user can cause becomes one line and an exit code.

    The context is untyped here because which click it comes from depends on typer's version.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug wherever it stands, before or after the command's name."""
        options = args[: args.index("--")] if "--" in args else args
        if "--debug" in options:
            args = ["--debug", *(a for a in options if a != "--debug"), *args[len(options) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe left: click exits quietly
        except (LatentKVError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {error}", err=True)
            if isinstance(error, RankError):
                _end_now(RANK_LOST)
            raise typer.Exit(USAGE_ERROR) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            raise typer.Exit(INTERRUPTED) from None


def _end_now(code: int) -> None:
    """End, though a thread may wait for ever for what another process would have said."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        # Imported here because it is slow to import and only this needs it.
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"latentkv {version('latentkv')}")
        except PackageNotFoundError:
            typer.echo("latentkv (run from its source, not installed)")
        raise typer.Exit


def make_app(names: Iterable[str] = (*COMMANDS, *OTHER_NAMES)) -> typer.Typer:
    """The command line with some of its commands; those that are left out take no time."""
    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(latentkv)
    for name in names:
        meant = OTHER_NAMES.get(name, name).replace("-", "_")
        module = import_module(f"latentkv.cli.{meant}")
        if meant == "bench":
            app.add_typer(module.bench_app, name=name)
        else:
            app.command(name, hidden=name in OTHER_NAMES)(command(getattr(module, meant)))
    return app


def latentkv(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Language models with Multi-head Latent Attention (MLA): run, chat, serve, plan, quantize, convert, train, bench.

    Start with: latentkv generate "It was a dark night"
    """


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the command that these arguments name, or with all where they name none."""
    # The first word is the command: the options before it take none.
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    return make_app([word]) if word in (*COMMANDS, *OTHER_NAMES) else make_app()


def main() -> None:
    """Run the command line."""
    app_for(sys.argv[1:])()
