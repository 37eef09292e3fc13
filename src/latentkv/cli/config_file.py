"""`serve --config FILE`: options in a TOML file, under the names of their flags; those on the line count for more."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import typer

from latentkv.errors import ConfigError


def read_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the values of a file be the defaults of the command that is about to be run.

    Raises:
        ConfigError: the file cannot be read, or has a key that is no option of the command, or a value that is none.
    """
    if path is None:
        return None
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}.") from None
    known = {
        flag.lstrip("-"): option
        for option in ctx.command.params
        if option.param_type_name == "option" and not option.is_eager
        for flag in option.opts
        if flag.startswith("--")
    }
    defaults: dict[str, Any] = {}
    for key, value in said.items():
        name = key.replace("_", "-")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" do you mean {near[0]}?" if near else f" it has {', '.join(sorted(known))}."
            raise ConfigError(f"{path}: {key!r} is no option of {ctx.info_name}:{hint}")
        defaults[known[name].name or name] = _as_typed(f"{path}: {key}", value, known[name])
    ctx.default_map = defaults
    return path


def _as_typed(where: str, value: Any, option: Any) -> Any:
    """What typer would have read on the command line."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, not {value!r}.")
        return value
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise ConfigError(f"{where} must be a text or a number, or a list of such, not {value!r}.")
    texts = [str(each) for each in values]
    return texts if option.multiple else ",".join(texts)
