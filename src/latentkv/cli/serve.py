"""`latentkv serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from latentkv.cli.options import (
    MODEL_FORMS,
    ActivationsOption,
    CacheBytesOption,
    CacheDirBytesOption,
    CacheDirOption,
    DeviceOption,
    DtypeOption,
    Int8ProductsOption,
    KVDtypeOption,
    MaxContextOption,
    ModelChoice,
    NoPackedDirOption,
    PackedDirBytesOption,
    PackedDirOption,
    PipelineParallelOption,
    RankTimeoutOption,
    TensorParallelOption,
    TrustNetworkOption,
    WeightsOption,
    cache_summary,
    store_summary,
    turn_end_note,
)
from latentkv.cli.terminal import console
from latentkv.errors import ConfigError

KEYS_VARIABLE = "LATENTKV_API_KEYS"
END_SECONDS = 10
"""After open requests, that the server and the other ranks may take to end."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help=f"The model: {MODEL_FORMS}.", show_default="the small model in this package"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="its folder or repo id")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"API keys, one a line; the variable {KEYS_VARIABLE} works too.")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Let other machines in without an API key.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that browsers let in; repeatable.")
    ] = None,
    weights: WeightsOption = None,
    activations: ActivationsOption = "exact",
    kv_dtype: KVDtypeOption = "auto",
    int8_products: Int8ProductsOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    max_context: MaxContextOption = None,
    kv_cache_bytes: CacheBytesOption = None,
    cache_dir: CacheDirOption = None,
    cache_dir_bytes: CacheDirBytesOption = None,
    packed_dir: PackedDirOption = None,
    no_packed_dir: NoPackedDirOption = False,
    packed_dir_bytes: PackedDirBytesOption = None,
    pipeline_parallel: PipelineParallelOption = 1,
    tensor_parallel: TensorParallelOption = 1,
    rank_timeout: RankTimeoutOption = 60,
    trust_network: TrustNetworkOption = False,
    tool_format: Annotated[
        str | None, typer.Option(help="How the model writes tool calls.", show_default="as its template tells")
    ] = None,
    speculate: Annotated[
        int, typer.Option(min=0, max=16, help="Draft so many tokens where it seems to pay; the answers stay the same.")
    ] = 0,
    draft: Annotated[
        str, typer.Option(help="What drafts: ngram (the text so far), mtp (the model's module for it), auto (both).")
    ] = "auto",
    max_running: Annotated[int, typer.Option(min=1, max=1024, help="Requests in a step at most.")] = 64,
    max_open: Annotated[
        int, typer.Option(min=1, max=65536, help="Requests under way and waiting; more get 429.")
    ] = 256,
    request_seconds: Annotated[float, typer.Option(min=1, help="A request may take at most.")] = 3600,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Open requests may take when told to stop.")] = 30,
    max_body_mib: Annotated[int, typer.Option(min=1, max=1024, help="Size of a request's body at most.")] = 2,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.")] = False,
) -> None:
    """Serve a model: an OpenAI-compatible API, a chat page at /, metrics at /metrics.

    Example: latentkv serve ./model --port 8000 --kv-cache-bytes 4GiB
    """
    from latentkv.checkpoint.source import model_name
    from latentkv.server.run import bind, make_server, serve_forever
    from latentkv.server.served import STEP_SECONDS
    from latentkv.server.settings import ServerSettings, read_keys

    settings = ServerSettings(
        api_keys=read_keys(api_key_file, os.environ.get(KEYS_VARIABLE)),
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_mib << 20,
        max_open=max_open,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        log_prompts=log_prompts,
    )
    if host not in LOOPBACK and not settings.api_keys and not allow_anyone:
        raise ConfigError(
            f"{host} can be reached from other machines: give API keys by --api-key-file or {KEYS_VARIABLE}, "
            "or say --allow-anyone."
        )
    choice = ModelChoice(
        *(model, device, dtype, weights, activations, kv_dtype, int8_products, max_context, kv_cache_bytes),
        cache_dir=cache_dir,
        cache_dir_bytes=cache_dir_bytes,
        packed_dir=packed_dir,
        no_packed_dir=no_packed_dir,
        packed_dir_bytes=packed_dir_bytes,
        pipeline_parallel=pipeline_parallel,
        tensor_parallel=tensor_parallel,
        rank_timeout=rank_timeout,
        trust_network=trust_network,
    )
    engine = {
        "max_running": max_running,
        "speculate": speculate,
        "draft": draft,
        "step_seconds": STEP_SECONDS,
    }
    choice.enter_ranks(end_seconds=drain_seconds + END_SECONDS, **engine)
    listening = bind(host, port)
    llm = choice.load(**engine)
    shown = name or (model_name(model) if model else "latentkv")
    server = make_server(llm, shown, settings, tool_format=tool_format)
    out = console(stderr=True)
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listening.getsockname()[1]}"
    out.print(f"Serving {shown} on {address} - chat page at {address}/, API at {address}/v1", highlight=False)
    out.print(cache_summary(llm), style="dim")
    if llm.unnamed_turn_end is not None:
        out.print(turn_end_note(llm.unnamed_turn_end), style="dim", markup=False)
    if llm.store:
        out.print(store_summary(llm.store), style="dim")
    code = serve_forever(listening, server)
    if server.model.thread.alive:
        os._exit(code or 1)  # it hangs in a step, and would keep the process alive
    if server.model.thread.health().state == "dead":
        raise typer.Exit(code or 1)
    llm.close()
    raise typer.Exit(code)
