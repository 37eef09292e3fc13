"""`latentkv bench`: measure the claims on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.bench_gpu import gpu_attention, require_unset, tune
from latentkv.cli.bench_model import make_model, model
from latentkv.cli.bench_options import Contexts, JsonFile, KVDtype, Repeats, Threads, numbers, require_folder, save
from latentkv.cli.bench_parallel import parallel
from latentkv.cli.bench_serve import serve
from latentkv.cli.bench_server_cost import server_cost
from latentkv.cli.bench_speculation import speculation
from latentkv.cli.bench_start import start
from latentkv.cli.bench_tensor_parallel import tensor_parallel
from latentkv.cli.terminal import console

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.bench.environment import Environment
    from latentkv.bench.shapes import AttentionShape

bench_app = typer.Typer(no_args_is_help=True, help="Measure attention, models, servers and this machine's ceilings.")
bench_app.command()(model)
bench_app.command("make-model")(make_model)
bench_app.command()(parallel)
bench_app.command()(serve)
bench_app.command("server-cost")(server_cost)
bench_app.command()(speculation)
bench_app.command()(start)
bench_app.command("tensor-parallel")(tensor_parallel)
bench_app.command()(tune)


@bench_app.command()
def attention(
    shape: Annotated[str, typer.Option(help="Published layer: v2-lite or v3.")] = "v2-lite",
    heads: Annotated[
        int | None, typer.Option(help="Number of heads.", show_default="the shape's; on a GPU 128 and 16")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Cached tokens, with commas between.", show_default="1k,8k,32k; on a GPU 4k to 128k"),
    ] = None,
    kv_dtype: KVDtype = "bf16",
    repeats: Repeats = 20,
    threads: Threads = None,
    transformers_attention: Annotated[
        str, typer.Option(help="How transformers attends: sdpa (its default) or eager.")
    ] = "sdpa",
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw milliseconds against context.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: there mla_decode alone, over bf16 and fp8 pages, against its ceilings.")
    ] = "cpu",
) -> None:
    """Compare one decode step of one attention layer: LatentKV, transformers, and MHA that caches whole heads.

    All have the same weights and the same cached tokens, and each answer is checked before it is timed.

    Example: latentkv bench attention --contexts 1k,8k --json attention.json --plot attention.png
    """
    if device != "cpu":
        given = {"--shape": shape != "v2-lite", "--kv-dtype": kv_dtype != "bf16", "--threads": threads is not None}
        given |= {"--transformers-attention": transformers_attention != "sdpa", "--plot": plot is not None}
        require_unset(device, given)
        gpu_attention(device, heads=heads, contexts=contexts, repeats=repeats, json_file=json_file)
        return
    from latentkv.bench.attention import CONTEXTS, measure_attention
    from latentkv.bench.report import ATTENTION_NOTES, attention_table, ceilings_table, describe
    from latentkv.plan import as_kv_format

    layer, kv_format = _shape(shape, heads), as_kv_format(kv_dtype)
    require_folder(json_file, plot)
    screen = console()
    with console(stderr=True).status("starting") as status:
        report = measure_attention(
            layer,
            contexts=CONTEXTS if contexts is None else numbers(contexts),
            kv_format=kv_format,
            repeats=repeats,
            threads=threads,
            transformers_attention=transformers_attention,
            progress=status.update,
        )
    screen.print(ceilings_table(report.ceilings))
    screen.print(attention_table(report))
    screen.print(ATTENTION_NOTES, style="dim")
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)
    if plot is not None:
        from latentkv.bench.plot import plot_attention

        plot_attention(report, plot)
        screen.print(f"Plot in {plot}")


@bench_app.command("mla-decode")
def mla_decode(
    heads: Annotated[str, typer.Option(help="Numbers of heads, with commas between.")] = "16,128",
    contexts: Contexts = "8k,32k,128k",
    batches: Annotated[str, typer.Option(help="Numbers of sequences, with commas between.")] = "1,4",
    kv_dtypes: Annotated[str, typer.Option(help="Formats of the pages, with commas between.")] = "bf16,int8,fp8",
    repeats: Repeats = 10,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a roofline.")] = None,
) -> None:
    """Compare the op mla_decode alone with torch's matrix products: one step of attention over a filled cache.

    Example: latentkv bench mla-decode --heads 16 --contexts 8k,32k --batches 1
    """
    from latentkv.bench.mla_decode import measure_mla_decode
    from latentkv.bench.op_report import MLA_DECODE_NOTES, mla_decode_table
    from latentkv.plan import as_kv_format

    require_folder(json_file, plot)
    with console(stderr=True).status("starting") as status:
        report = measure_mla_decode(
            heads=numbers(heads),
            contexts=numbers(contexts),
            batches=numbers(batches),
            kv_formats=[as_kv_format(name.strip()) for name in kv_dtypes.split(",")],
            repeats=repeats,
            threads=threads,
            progress=status.update,
        )
    _print(mla_decode_table(report), MLA_DECODE_NOTES, report.environment)
    save(report, json_file)
    if plot is not None:
        from latentkv.bench.roofline import plot_roofline

        plot_roofline(report, plot)
        console().print(f"Plot in {plot}")


@bench_app.command()
def sparse(
    model: Annotated[str, typer.Argument(help="Whose attention, as for `latentkv plan`.")] = "deepseek-v3.2",
    contexts: Contexts = "64k,128k",
    kv_dtype: KVDtype = "bf16",
    repeats: Repeats = 10,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Compare one decode step of a layer of sparse attention with the same layer that reads every token.

    Example: latentkv bench sparse --contexts 64k
    """
    from latentkv.bench.op_report import SPARSE_NOTES, sparse_table
    from latentkv.bench.sparse import measure_sparse
    from latentkv.plan import as_kv_format, load_config

    require_folder(json_file)
    config, kv_format = load_config(model), as_kv_format(kv_dtype)
    with console(stderr=True).status("starting") as status:
        report = measure_sparse(
            config,
            contexts=numbers(contexts),
            kv_format=kv_format,
            repeats=repeats,
            threads=threads,
            progress=status.update,
        )
    _print(sparse_table(report), SPARSE_NOTES, report.environment)
    save(report, json_file)


@bench_app.command()
def linear(
    size: Annotated[str, typer.Option(help="Outputs x inputs of the matrix.")] = "8192x2048",
    rows: Annotated[str, typer.Option(help="Numbers of rows, with commas between.")] = "1,2,4,8,16,48,64,256,512,2048",
    formats: Annotated[
        str, typer.Option(help="How weights are packed, with commas between; compact where it can be.")
    ] = "bf16,compact,int8,int4",
    group: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 or 128.", show_default="a row in int8, 128 in int4"),
    ] = None,
    rounded_input: Annotated[
        bool, typer.Option("--rounded-input", help="Measure products with activations of 8 bits, too.")
    ] = False,
    repeats: Repeats = 15,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Compare products with packed weights, which come from memory, with torch's product of bf16 ones.

    Example: latentkv bench linear --rows 1,16,256
    """
    from latentkv.bench.linear import as_packed_format, measure_linear
    from latentkv.bench.op_report import LINEAR_NOTES, linear_table

    require_folder(json_file)
    out_features, in_features = _size(size)
    with console(stderr=True).status("starting") as status:
        report = measure_linear(
            out_features=out_features,
            in_features=in_features,
            rows=numbers(rows),
            formats=[as_packed_format(name.strip()) for name in formats.split(",")],
            group=group,
            rounded_input=rounded_input,
            repeats=repeats,
            threads=threads,
            progress=status.update,
        )
    _print(linear_table(report), LINEAR_NOTES, report.environment)
    save(report, json_file)


@bench_app.command()
def ceilings(
    repeats: Repeats = 9,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what this machine can do at most: bf16 and fp32 matrix products, and reading memory."""
    from latentkv.bench.ceilings import CeilingsReport, measure_ceilings
    from latentkv.bench.environment import describe_environment
    from latentkv.bench.report import ceilings_table, describe
    from latentkv.bench.timing import torch_threads

    require_folder(json_file)
    with console(stderr=True).status("measuring this machine's ceilings"), torch_threads(threads) as used:
        environment = describe_environment(used)
        report = CeilingsReport(environment, measure_ceilings(repeats=repeats))
    screen = console()
    screen.print(ceilings_table(report.ceilings))
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)


def _size(text: str) -> tuple[int, int]:
    from latentkv.errors import RequestError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"A matrix is given as outputs x inputs, such as 8192x2048, not {text!r}.")
    return int(parts[0]), int(parts[1])


def _print(table: Table, notes: str, environment: Environment) -> None:
    from latentkv.bench.report import describe

    screen = console()
    screen.print(table)
    screen.print(notes, style="dim")
    screen.print(describe(environment), style="dim")


def _shape(name: str, heads: int | None) -> AttentionShape:
    from dataclasses import replace

    from latentkv.bench.shapes import SHAPES
    from latentkv.errors import RequestError

    if name not in SHAPES:
        raise RequestError(f"{name!r} is not a known shape; choose from {', '.join(SHAPES)}.")
    if heads is None:
        return SHAPES[name]
    if heads < 1 or SHAPES[name].hidden_size % heads:
        raise RequestError(f"{heads} heads do not divide the hidden size of {SHAPES[name].hidden_size}.")
    return replace(SHAPES[name], num_heads=heads)
