"""`latentkv serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.config_file import read_config_file
from latentkv.cli.flags import Preset
from latentkv.cli.loading import (
    DEFAULT_NAME,
    cache_summary,
    enter_ranks,
    load_model,
    sampling_note,
    store_summary,
    turn_end_note,
)
from latentkv.cli.terminal import console
from latentkv.errors import ConfigError
from latentkv.option_types import Flag
from latentkv.options import LLMOptions
from latentkv.ranges import Range
from latentkv.server.settings import ServerSettings, read_keys

if TYPE_CHECKING:
    from latentkv.server.context import Server

KEYS_VARIABLE = "LATENTKV_API_KEYS"
END_SECONDS = 10
"""After open requests, that the server and the other ranks may take to end."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    options: Annotated[LLMOptions, Preset(max_running=64)],
    /,
    settings: Annotated[ServerSettings, Preset("api_keys", "max_body_bytes")],
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Range(0, 65535)] = 8000,
    config: Annotated[Path | None, Flag(metavar="FILE.toml", callback=read_config_file)] = None,
    name: Annotated[tuple[str, ...], Flag(("--name", "--served-model-name"))] = (),
    api_key_file: Path | None = None,
    allow_anyone: bool = False,
    tool_format: str | None = None,
    max_body_mib: Annotated[int, Range(1, 1024)] = 2,
) -> None:
    """Serve a model: an OpenAI-compatible API, a chat page at /, metrics at /metrics.

    Example: latentkv serve ./model --port 8000 --kv-cache-bytes 4GiB

    Args:
        options: the model.
        settings: the server.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on; 0 takes a free one.
        config: file with options, under the names of their flags, which count for more on the command line.
        name: what clients call the model, instead of its folder or repo id; repeatable, the first is that of answers.
        api_key_file: file with API keys, one a line; the variable LATENTKV_API_KEYS works too.
        allow_anyone: let other machines in without an API key.
        tool_format: how the model writes tool calls; None is as its template tells.
        max_body_mib: size of a request's body at most, in MiB.
    """
    from latentkv.checkpoint.source import model_name
    from latentkv.server.run import bind, make_server, serve_forever
    from latentkv.server.served import STEP_SECONDS

    settings = replace(
        settings, api_keys=read_keys(api_key_file, os.environ.get(KEYS_VARIABLE)), max_body_bytes=max_body_mib << 20
    )
    if host not in LOOPBACK and not settings.api_keys and not allow_anyone:
        raise ConfigError(
            f"{host} can be reached from other machines: give API keys by --api-key-file or {KEYS_VARIABLE}, "
            "or say --allow-anyone."
        )
    options, end_seconds = replace(options, step_seconds=STEP_SECONDS), settings.drain_seconds + END_SECONDS
    enter_ranks(options, end_seconds=end_seconds)
    listening = bind(host, port)
    shown, *others = name or (model_name(options.model) if options.model else "latentkv",)
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listening.getsockname()[1]}"
    out = console(stderr=True)
    source = options.model or DEFAULT_NAME
    out.print(f"Loading {shown} ({source}); until it stands, {address}/health says 503", markup=False, style="dim")
    loaded: list[Server] = []

    def load() -> Server:
        llm = load_model(options, end_seconds=end_seconds)
        loaded.append(make_server(llm, shown, settings, tool_format=tool_format, other_names=others))
        return loaded[0]

    def ready(server: Server) -> None:
        llm = server.model.llm
        out.print(f"Serving {shown} on {address} - chat page at {address}/, API at {address}/v1", highlight=False)
        out.print(cache_summary(llm), style="dim")
        if llm.sampling_defaults:
            out.print(sampling_note(llm), style="dim", highlight=False)
        if llm.unnamed_turn_end is not None:
            out.print(turn_end_note(llm.unnamed_turn_end), style="dim", markup=False)
        if llm.store:
            out.print(store_summary(llm.store), style="dim")

    code = serve_forever(listening, load, settings, ready)
    if not loaded or loaded[0].model.thread.alive:
        sys.stderr.flush()
        os._exit(code if not loaded else code or 1)  # it loads, or hangs in a step, and would keep the process alive
    if loaded[0].model.thread.health().state == "dead":
        raise typer.Exit(code or 1)
    loaded[0].model.llm.close()
    raise typer.Exit(code)
