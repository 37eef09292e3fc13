"""`latentkv bench attention --device cuda` and `latentkv bench tune`: the GPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from latentkv.cli.bench_options import MeasureOptions, require_folder
from latentkv.cli.terminal import console
from latentkv.option_types import Flag, Numbers, Tokens, Words


def gpu_attention(device: str, *, heads: int | None, contexts: Sequence[int] | None, options: MeasureOptions) -> None:
    """Measure `mla_decode` on a GPU and print the table."""
    from latentkv.bench.gpu.attention import CASES, GpuCase, measure_gpu_attention
    from latentkv.bench.gpu.report import GPU_NOTES, describe_gpu_environment, gpu_attention_table
    from latentkv.llm_options import as_device

    gpu = as_device(device)
    cases = CASES
    if contexts is not None:
        cases = tuple(GpuCase(h, b, context) for h in (128, 16) for b in (128, 1) for context in contexts)
    if heads is not None:
        cases = tuple(dict.fromkeys(GpuCase(heads, case.batch, case.context) for case in cases))
    with options.measuring("starting") as progress:
        report = measure_gpu_attention(gpu, cases=cases, repeats=options.repeats, progress=progress)
    screen = console()
    screen.print(gpu_attention_table(report))
    screen.print(GPU_NOTES, style="dim")
    screen.print(describe_gpu_environment(report.environment), style="dim")
    options.save(report)


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
    *,
    device: str = "cuda",
    heads: Numbers = (16, 128),
    batch: int = 128,
    context: Tokens = 8192,
    kv_dtypes: Words = ("bf16", "fp8", "int8"),
    out: Annotated[Path | None, Flag(metavar="FILE.json")] = None,
) -> None:
    """Measure which block sizes of the GPU's attention kernel are the fastest, and keep them.

    They are found again by the GPU's name and the shape: see docs/gpu.md.

    Example: latentkv bench tune --heads 16 --kv-dtypes bf16

    Args:
        device: the GPU: cuda, cuda:1.
        heads: numbers of heads, with commas between.
        batch: sequences to measure with.
        context: cached tokens of each.
        kv_dtypes: formats of the pages, with commas between.
        out: where the block sizes go; None is LatentKV's own file.
    """
    from latentkv.bench.gpu.attention import GpuCase
    from latentkv.bench.gpu.report import describe_gpu_environment, tuned_table
    from latentkv.bench.gpu.timing import describe_gpu
    from latentkv.bench.gpu.tune import tune_attention
    from latentkv.llm_options import as_device
    from latentkv.ops.triton.tuned import TUNED_FILE
    from latentkv.plan import as_kv_format

    gpu, path = as_device(device), out or TUNED_FILE
    require_folder(path)
    with console(stderr=True).status("starting") as status:
        rows = tune_attention(
            gpu,
            path,
            cases=[GpuCase(h, batch, context) for h in heads],
            kv_formats=[as_kv_format(name) for name in kv_dtypes],
            progress=status.update,
        )
    screen = console()
    screen.print(tuned_table(rows))
    screen.print(describe_gpu_environment(describe_gpu(gpu)), style="dim")
    screen.print(f"Block sizes in {path}")
