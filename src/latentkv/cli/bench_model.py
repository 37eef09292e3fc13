"""`latentkv bench model` and `make-model`: whole models, real or of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from latentkv.cli.bench_options import ONE_MODEL, MeasureOptions
from latentkv.cli.flags import Preset
from latentkv.cli.loading import load_here
from latentkv.cli.terminal import console
from latentkv.option_types import Flag, Numbers
from latentkv.options import LLMOptions


def model(
    options: Annotated[LLMOptions, ONE_MODEL],
    /,
    measure: Annotated[MeasureOptions, Preset("threads", repeats=5)],
    *,
    prompts: Numbers = (512, 2048),
    depths: Numbers = (0, 4096, 16384, 32768),
    concurrency: Numbers = (1,),
    new_tokens: int = 16,
    mha: bool = False,
    transformers: bool = False,
    peer: Annotated[tuple[str, ...], Flag(metavar="COMMAND")] = (),
    limit: float = 20.0,
) -> None:
    """Measure how fast a model reads prompts and decodes at several depths, and the memory it takes.

    Prompts one at a time, and decoding, unless --concurrency says otherwise. The cache before a decode step is filled
    with random numbers once, not by reading a prompt.

    Example: latentkv bench model --prompts 64 --depths 0,128

    Args:
        options: the model; where nothing is said of its cache there is room for the deepest case, once.
        measure: how it is measured.
        prompts: tokens of the prompts that are read, with commas between.
        depths: tokens in the cache before the first decode step, with commas between.
        concurrency: sequences that decode together at each depth, with commas between.
        new_tokens: decode steps that are timed together.
        mha: measure the same model with multi-head attention, too.
        transformers: measure the checkpoint in transformers, too (bf16).
        peer: measure another program, too; benchmarks/llama_cpp has one; repeatable.
        limit: seconds; a contender whose rounds of a case take longer is timed once.
    """
    from latentkv.bench.models.model import measure_model
    from latentkv.bench.models.report import MODEL_NOTES, model_facts, model_table, plot_decode
    from latentkv.checkpoint.source import model_name

    options = replace(options, max_context=options.max_context or max(*prompts, *depths) + new_tokens)
    with measure.measuring("loading the model") as progress:
        report = measure_model(
            load_here(options),
            name=model_name(options.model) if options.model else "the embedded model",
            prompts=prompts,
            depths=depths,
            concurrency=concurrency,
            new_tokens=new_tokens,
            repeats=measure.repeats,
            threads=options.threads,
            weights=options.weights,
            activations=options.activations,
            mha=mha,
            transformers=transformers,
            peers=peer,
            limit_seconds=limit,
            progress=progress,
        )
    parts = model_table(report), model_facts(report)
    measure.show(report, *parts, notes=MODEL_NOTES, draw=lambda report, path: plot_decode([report], path))


def make_model(shape: str, folder: Path, /, *, weights: str | None = None, seed: int = 0) -> None:
    """Write a checkpoint of a published shape with random weights, to measure speed and memory with.

    v2-lite and youtu-llm-2b are DeepSeek-V2-Lite (15.7 B parameters; 31 GB in bf16, 9 GB in int4) and Youtu-LLM-2B;
    v2-lite-4 has the first 4 layers and a vocabulary of 32,768 (1.97 B), v2-lite-8e all 27 layers with 8 of the 64
    experts (3.11 B). ling-3.0-tiny is Ling-3.0-tiny (7.89 B), a hybrid; ling-3.0-tiny-8 has its first 8 layers and the
    same small vocabulary (2.38 B).

    Example: latentkv bench make-model v2-lite-4 models/v2-lite-4

    Args:
        shape: v2-lite, v2-lite-4, v2-lite-8e, youtu-llm-2b, ling-3.0-tiny or ling-3.0-tiny-8.
        folder: where the checkpoint goes.
        weights: store int8 or int4 weights; None is bf16.
        seed: seed of the weights.
    """
    from latentkv.bench.models.synthetic import synthetic_config, write_synthetic
    from latentkv.weights.weight import require_format

    form = None if weights is None else require_format(weights, None)
    with console(stderr=True).status(f"writing {folder}"):
        parameters = write_synthetic(synthetic_config(shape), folder, seed=seed, weights=form)
    console().print(f"{parameters:,} parameters in {folder}")
