"""`latentkv bench`: measure the claims on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.bench_gpu import gpu_attention, require_unset, tune
from latentkv.cli.bench_model import make_model, model
from latentkv.cli.bench_options import MeasureOptions
from latentkv.cli.bench_parallel import parallel
from latentkv.cli.bench_serve import serve
from latentkv.cli.bench_server_cost import server_cost
from latentkv.cli.bench_speculation import speculation
from latentkv.cli.bench_start import start
from latentkv.cli.bench_tensor_parallel import tensor_parallel
from latentkv.cli.flags import Preset, command
from latentkv.option_types import Flag, KVDtype, Numbers, Words

if TYPE_CHECKING:
    from latentkv.bench.shapes import AttentionShape


def attention(
    *,
    shape: str = "v2-lite",
    heads: int | None = None,
    contexts: Numbers | None = None,
    kv_dtype: KVDtype = "bf16",
    transformers_attention: str = "sdpa",
    device: str = "cpu",
    measure: Annotated[MeasureOptions, Preset(repeats=20)],
) -> None:
    """Compare one decode step of one attention layer: LatentKV, transformers, and MHA that caches whole heads.

    All have the same weights and the same cached tokens, and each answer is checked before it is timed.

    Example: latentkv bench attention --contexts 1k,8k --json attention.json --plot attention.png

    Args:
        shape: published layer: v2-lite or v3.
        heads: number of heads; None is the shape's, or on a GPU 128 and 16.
        contexts: cached tokens, with commas between; None is 1k,8k,32k, or on a GPU 4k to 128k.
        kv_dtype: format of LatentKV's cache: bf16, fp8, int8, fp16 or fp32.
        transformers_attention: how transformers attends: sdpa (its default) or eager.
        device: cpu, or cuda: there mla_decode alone, over bf16 and fp8 pages, against its ceilings.
        measure: how it is measured.
    """
    if device != "cpu":
        given = {
            "--shape": shape != "v2-lite",
            "--kv-dtype": kv_dtype != "bf16",
            "--threads": measure.threads is not None,
        }
        given |= {"--transformers-attention": transformers_attention != "sdpa", "--plot": measure.plot is not None}
        require_unset(device, given)
        gpu_attention(device, heads=heads, contexts=contexts, options=measure)
        return
    from latentkv.bench.layer.attention import CONTEXTS, measure_attention
    from latentkv.bench.report import ATTENTION_NOTES, attention_table, ceilings_table
    from latentkv.plan import as_kv_format

    layer, kv_format = _shape(shape, heads), as_kv_format(kv_dtype)
    with measure.measuring("starting") as progress:
        report = measure_attention(
            layer,
            contexts=contexts or CONTEXTS,
            kv_format=kv_format,
            repeats=measure.repeats,
            threads=measure.threads,
            transformers_attention=transformers_attention,
            progress=progress,
        )
    from latentkv.bench.plot import plot_attention

    tables = ceilings_table(report.ceilings), attention_table(report)
    measure.show(report, *tables, notes=ATTENTION_NOTES, draw=plot_attention)


def mla_decode(
    *,
    heads: Numbers = (16, 128),
    contexts: Numbers = (8192, 32768, 131072),
    batches: Numbers = (1, 4),
    kv_dtypes: Words = ("bf16", "int8", "fp8"),
    measure: Annotated[MeasureOptions, Preset(repeats=10)],
) -> None:
    """Compare the op mla_decode alone with torch's matrix products: one step of attention over a filled cache.

    Example: latentkv bench mla-decode --heads 16 --contexts 8k,32k --batches 1

    Args:
        heads: numbers of heads, with commas between.
        contexts: cached tokens, with commas between.
        batches: numbers of sequences, with commas between.
        kv_dtypes: formats of the pages, with commas between.
        measure: how it is measured.
    """
    from latentkv.bench.ops.mla_decode import measure_mla_decode
    from latentkv.bench.ops.report import MLA_DECODE_NOTES, mla_decode_table
    from latentkv.plan import as_kv_format

    with measure.measuring("starting") as progress:
        report = measure_mla_decode(
            heads=heads,
            contexts=contexts,
            batches=batches,
            kv_formats=[as_kv_format(name) for name in kv_dtypes],
            repeats=measure.repeats,
            threads=measure.threads,
            progress=progress,
        )
    from latentkv.bench.ops.roofline import plot_roofline

    measure.show(report, mla_decode_table(report), notes=MLA_DECODE_NOTES, draw=plot_roofline)


def sparse(
    model: Annotated[str, Flag(("--model", "-m"))] = "deepseek-v3.2",
    /,
    *,
    contexts: Numbers = (65536, 131072),
    kv_dtype: KVDtype = "bf16",
    measure: Annotated[MeasureOptions, Preset("plot", repeats=10)],
) -> None:
    """Compare one decode step of a layer of sparse attention with the same layer that reads every token.

    Example: latentkv bench sparse --contexts 64k

    Args:
        model: whose attention, as for `latentkv plan`.
        contexts: cached tokens, with commas between.
        kv_dtype: format of LatentKV's cache: bf16, fp8, int8, fp16 or fp32.
        measure: how it is measured.
    """
    from latentkv.bench.layer.sparse import measure_sparse
    from latentkv.bench.ops.report import SPARSE_NOTES, sparse_table
    from latentkv.plan import as_kv_format, load_config

    config, kv_format = load_config(model), as_kv_format(kv_dtype)
    with measure.measuring("starting") as progress:
        report = measure_sparse(
            config,
            contexts=contexts,
            kv_format=kv_format,
            repeats=measure.repeats,
            threads=measure.threads,
            progress=progress,
        )
    measure.show(report, sparse_table(report), notes=SPARSE_NOTES)


def _size(text: str) -> tuple[int, int]:
    from latentkv.errors import RequestError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"{text!r} is no matrix; write outputs x inputs, such as 8192x2048.")
    return int(parts[0]), int(parts[1])


def _show_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def linear(
    *,
    size: Annotated[tuple[int, int], Flag(read=_size, show=_show_size, metavar="OxI")] = (8192, 2048),
    rows: Numbers = (1, 2, 4, 8, 16, 48, 64, 256, 512, 2048),
    formats: Words = ("bf16", "compact", "int8", "int4"),
    group: int | None = None,
    rounded_input: bool = False,
    measure: Annotated[MeasureOptions, Preset("plot", repeats=15)],
) -> None:
    """Compare products with packed weights, which come from memory, with torch's product of bf16 ones.

    Example: latentkv bench linear --rows 1,16,256

    Args:
        size: outputs x inputs of the matrix.
        rows: numbers of rows, with commas between.
        formats: how weights are packed, with commas between; compact where it can be.
        group: weights that share a scale: 32, 64 or 128; None is a row in int8, 128 in int4.
        rounded_input: measure products with activations of 8 bits, too.
        measure: how it is measured.
    """
    from latentkv.bench.ops.linear import as_packed_format, measure_linear
    from latentkv.bench.ops.report import LINEAR_NOTES, linear_table

    out_features, in_features = size
    with measure.measuring("starting") as progress:
        report = measure_linear(
            out_features=out_features,
            in_features=in_features,
            rows=rows,
            formats=[as_packed_format(name) for name in formats],
            group=group,
            rounded_input=rounded_input,
            repeats=measure.repeats,
            threads=measure.threads,
            progress=progress,
        )
    measure.show(report, linear_table(report), notes=LINEAR_NOTES)


def ceilings(*, measure: Annotated[MeasureOptions, Preset("plot")]) -> None:
    """Measure what this machine can do at most: bf16 and fp32 matrix products, and reading memory.

    Args:
        measure: how it is measured.
    """
    from latentkv.bench.ceilings import CeilingsReport, measure_ceilings
    from latentkv.bench.environment import describe_environment
    from latentkv.bench.report import ceilings_table
    from latentkv.bench.timing import torch_threads

    with measure.measuring("measuring this machine's ceilings"), torch_threads(measure.threads) as used:
        environment = describe_environment(used)
        report = CeilingsReport(environment, measure_ceilings(repeats=measure.repeats))
    measure.show(report, ceilings_table(report.ceilings))


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


bench_app = typer.Typer(no_args_is_help=True, help="Measure attention, models, servers and this machine's ceilings.")
for _command in (
    *(model, make_model, parallel, serve, server_cost, speculation, start, tensor_parallel, tune),
    *(attention, mla_decode, sparse, linear, ceilings),
):
    bench_app.command(_command.__name__.replace("_", "-"))(command(_command))
