"""`latentkv bench attention --device cuda` and `latentkv bench tune`: the GPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from latentkv.cli.bench_options import numbers, require_folder, save
from latentkv.cli.terminal import console


def gpu_attention(
    device: str, *, heads: int | None, contexts: str | None, repeats: int, json_file: Path | None
) -> None:
    """Measure `mla_decode` on a GPU and print the table."""
    from latentkv.bench.gpu_attention import CASES, GpuCase, measure_gpu_attention
    from latentkv.bench.gpu_report import GPU_NOTES, describe_gpu_environment, gpu_attention_table
    from latentkv.llm_options import as_device

    gpu = as_device(device)
    require_folder(json_file)
    cases = CASES
    if contexts is not None:
        chosen = numbers(contexts)
        cases = tuple(GpuCase(h, b, context) for h in (128, 16) for b in (128, 1) for context in chosen)
    if heads is not None:
        cases = tuple(dict.fromkeys(GpuCase(heads, case.batch, case.context) for case in cases))
    with console(stderr=True).status("starting") as status:
        report = measure_gpu_attention(gpu, cases=cases, repeats=repeats, progress=status.update)
    screen = console()
    screen.print(gpu_attention_table(report))
    screen.print(GPU_NOTES, style="dim")
    screen.print(describe_gpu_environment(report.environment), style="dim")
    save(report, json_file)


def require_unset(device: str, given: Mapping[str, bool]) -> None:
    """Refuse options that a device's measurement has no use for, rather than ignore them.

    Args:
        device: as asked for.
        given: whether each option was given, by its name.
    """
    from latentkv.errors import RequestError

    unused = [name for name, used in given.items() if used]
    if unused:
        raise RequestError(f"--device {device} measures mla_decode alone, without {', '.join(unused)}: leave that out.")


def tune(
    device: Annotated[str, typer.Option(help="The GPU: cuda, cuda:1.")] = "cuda",
    heads: Annotated[str, typer.Option(help="Numbers of heads, with commas between.")] = "16,128",
    batch: Annotated[int, typer.Option(help="Sequences to measure with.")] = 128,
    context: Annotated[str, typer.Option(help="Cached tokens of each.")] = "8k",
    kv_dtypes: Annotated[str, typer.Option(help="Formats of the pages, with commas between.")] = "bf16,fp8,int8",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Where they go.", show_default="LatentKV's own file")
    ] = None,
) -> None:
    """Measure which block sizes of the GPU's attention kernel are the fastest, and keep them.

    They are found again by the GPU's name and the shape: see docs/gpu.md.

    Example: latentkv bench tune --heads 16 --kv-dtypes bf16
    """
    from latentkv.bench.gpu_attention import GpuCase
    from latentkv.bench.gpu_report import describe_gpu_environment, tuned_table
    from latentkv.bench.gpu_timing import describe_gpu
    from latentkv.bench.gpu_tune import tune_attention
    from latentkv.llm_options import as_device
    from latentkv.ops.triton.tuned import TUNED_FILE
    from latentkv.plan import as_kv_format

    gpu, path = as_device(device), out or TUNED_FILE
    require_folder(path)
    (tokens,) = numbers(context)
    with console(stderr=True).status("starting") as status:
        rows = tune_attention(
            gpu,
            path,
            cases=[GpuCase(h, batch, tokens) for h in numbers(heads)],
            kv_formats=[as_kv_format(name.strip()) for name in kv_dtypes.split(",")],
            progress=status.update,
        )
    screen = console()
    screen.print(tuned_table(rows))
    screen.print(describe_gpu_environment(describe_gpu(gpu)), style="dim")
    screen.print(f"Block sizes in {path}")
