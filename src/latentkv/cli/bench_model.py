"""`latentkv bench model` and `make-model`: whole models, real or of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentkv.cli.bench_options import JsonFile, Repeats, Threads, numbers, require_folder, save
from latentkv.cli.options import (
    MODEL_FORMS,
    ActivationsOption,
    Int8ProductsOption,
    NoPackedDirOption,
    PackedDirBytesOption,
    PackedDirOption,
    packed_options,
)
from latentkv.cli.terminal import console


def model(
    model: Annotated[
        str | None, typer.Argument(help=f"The model: {MODEL_FORMS}.", show_default="the embedded model")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Tokens of the prompts that are read, with commas between.")] = "512,2k",
    depths: Annotated[
        str, typer.Option(help="Tokens in the cache before the first decode step, with commas between.")
    ] = "0,4k,16k,32k",
    concurrency: Annotated[
        str, typer.Option(help="Sequences that decode together at each depth, with commas between.")
    ] = "1",
    new_tokens: Annotated[int, typer.Option(help="Decode steps that are timed together.")] = 16,
    repeats: Repeats = 5,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: bf16, fp16 or fp32.", show_default="the checkpoint's")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Quantise while loading: int8 or int4.", show_default="as stored")
    ] = None,
    activations: ActivationsOption = "exact",
    kv_dtype: Annotated[str, typer.Option(help="Of the cache: auto, bf16, fp8, int8, fp16 or fp32.")] = "auto",
    int8_products: Int8ProductsOption = False,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(help="Of the cache, like 4GiB.", show_default="room for the deepest case, once")
    ] = None,
    threads: Threads = None,
    mha: Annotated[bool, typer.Option("--mha", help="Measure the same model with multi-head attention, too.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Measure the checkpoint in transformers, too (bf16).")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="COMMAND", help="Measure another program, too; benchmarks/llama_cpp has one."),
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds: a contender whose rounds of a case take longer is timed once.")
    ] = 20.0,
    packed_dir: PackedDirOption = None,
    no_packed_dir: NoPackedDirOption = False,
    packed_dir_bytes: PackedDirBytesOption = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw decode speed against depth.")] = None,
) -> None:
    """Measure how fast a model reads prompts and decodes at several depths, and the memory it takes.

    Prompts one at a time, and decoding, unless --concurrency says otherwise. The cache before a decode step is filled
    with random numbers once, not by reading a prompt.

    Example: latentkv bench model --prompts 64 --depths 0,128
    """
    from latentkv.bench.model import measure_model
    from latentkv.bench.model_report import MODEL_NOTES, model_facts, model_table, plot_decode
    from latentkv.bench.report import describe
    from latentkv.checkpoint.source import model_name
    from latentkv.llm import LLM
    from latentkv.plan import as_kv_format
    from latentkv.plan.sizes import parse_bytes

    require_folder(json_file, plot)
    prompt_lens, depth_lens, together = numbers(prompts), numbers(depths), numbers(concurrency)
    with console(stderr=True).status("loading the model") as status:
        report = measure_model(
            LLM(
                model,
                dtype=dtype,
                weights=weights,
                activations=activations,
                kv_dtype="auto" if kv_dtype == "auto" else as_kv_format(kv_dtype),
                int8_products=int8_products,
                max_context=max(*prompt_lens, *depth_lens) + new_tokens,
                kv_cache_bytes=None if kv_cache_bytes is None else parse_bytes(kv_cache_bytes),
                **packed_options(packed_dir, no_packed_dir, packed_dir_bytes),
            ),
            name=model_name(model) if model else "the embedded model",
            prompts=prompt_lens,
            depths=depth_lens,
            concurrency=together,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            weights=weights,
            activations=activations,
            mha=mha,
            transformers=transformers,
            peers=peer or (),
            limit_seconds=limit,
            progress=status.update,
        )
    screen = console()
    screen.print(model_table(report))
    screen.print(model_facts(report))
    screen.print(MODEL_NOTES, style="dim")
    screen.print(describe(report.environment), style="dim")
    save(report, json_file)
    if plot is not None:
        plot_decode([report], plot)
        screen.print(f"Plot in {plot}")


def make_model(
    shape: Annotated[
        str, typer.Argument(help="v2-lite, v2-lite-4, v2-lite-8e, youtu-llm-2b, ling-3.0-tiny or ling-3.0-tiny-8.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    weights: Annotated[str | None, typer.Option(help="Store int8 or int4 weights.", show_default="bf16")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a checkpoint of a published shape with random weights, to measure speed and memory with.

    v2-lite and youtu-llm-2b are DeepSeek-V2-Lite (15.7 B parameters; 31 GB in bf16, 9 GB in int4) and Youtu-LLM-2B;
    v2-lite-4 has the first 4 layers and a vocabulary of 32,768 (1.97 B), v2-lite-8e all 27 layers with 8 of the 64
    experts (3.11 B). ling-3.0-tiny is Ling-3.0-tiny (7.89 B), a hybrid; ling-3.0-tiny-8 has its first 8 layers and the
    same small vocabulary (2.38 B).

    Example: latentkv bench make-model v2-lite-4 models/v2-lite-4
    """
    from latentkv.bench.synthetic import synthetic_config, write_synthetic
    from latentkv.weights.weight import require_format

    form = None if weights is None else require_format(weights, None)
    with console(stderr=True).status(f"writing {folder}"):
        parameters = write_synthetic(synthetic_config(shape), folder, seed=seed, weights=form)
    console().print(f"{parameters:,} parameters in {folder}")
