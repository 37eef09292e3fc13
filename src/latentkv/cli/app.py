"""`latentkv`: the commands, and what becomes of their errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentkv.cli.bench import bench_app
from latentkv.cli.chat import chat
from latentkv.cli.compare import compare
from latentkv.cli.convert import convert
from latentkv.cli.doctor import doctor
from latentkv.cli.generate import generate
from latentkv.cli.heal import heal
from latentkv.cli.inspect import inspect
from latentkv.cli.plan import plan
from latentkv.cli.quantize import quantize
from latentkv.cli.serve import serve
from latentkv.cli.train import train
from latentkv.errors import LatentKVError

USAGE_ERROR, INTERRUPTED = 2, 130


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
            raise typer.Exit(USAGE_ERROR) from None
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        # Imported here because it is slow to import and only this needs it.
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"latentkv {version('latentkv')}")
        except PackageNotFoundError:
            typer.echo("latentkv (run from its source, not installed)")
        raise typer.Exit


@app.callback()
def latentkv(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Language models with Multi-head Latent Attention (MLA): run, chat, serve, plan, quantize, convert, train, bench.

    Start with: latentkv generate "It was a dark night"
    """


for command in (generate, chat, serve, plan, inspect, quantize, convert, heal, train, compare, doctor):
    app.command()(command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line."""
    app()
