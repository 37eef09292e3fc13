"""`latentkv convert`: a grouped-query model into a latent-attention one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from latentkv.cli.conversion import EVAL_SEED, SELF, require_length, require_text_options, text_tokens
from latentkv.cli.flags import Preset
from latentkv.cli.loading import model_folder, use_threads
from latentkv.cli.run_facts import run_facts
from latentkv.cli.terminal import console, print_json, progress
from latentkv.convert import ConvertOptions
from latentkv.option_types import Flag
from latentkv.options import ModelName

if TYPE_CHECKING:
    from torch import Tensor

    from latentkv.convert import ConversionReport


def convert(
    source: Annotated[ModelName, Preset(model=...)],
    target: Path,
    /,
    *,
    options: ConvertOptions,
    calibrate: tuple[str, ...] = (SELF,),
    sequences: int = 128,
    length: int = 512,
    text: str | None = None,
    speed: bool | None = None,
    threads: int | None = None,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Turn a model with grouped-query (or multi-head) attention into one with latent attention.

    The result is a dense DeepSeek-V3 checkpoint, which transformers or vLLM loads too. What was saved and what it
    cost is in its report.html and report.json; `latentkv heal` wins most of it back. An interrupted run goes on when
    the same command is given again.

    Example: latentkv convert path/to/llama llama-mla --kv-budget 1/4 --calibrate book.txt

    Args:
        source: the model.
        target: a new folder for the converted model.
        options: sizes and method.
        calibrate: text to choose by: a UTF-8 text file, or self: what the source writes by itself; given several times,
            equal shares of each.
        sequences: sequences of calibration text.
        length: tokens of a sequence.
        text: report the perplexity on this, before and after: a file, or self.
        speed: measure both models' decode speed here; None is with `text`.
        threads: CPU threads; None is all cores.
        as_json: print the report as JSON.
    """
    from latentkv.checkpoint.source import model_name
    from latentkv.convert import (
        convert_checkpoint,
        note,
        read_record,
        require_convertible,
        require_target,
    )

    use_threads(threads)
    require_text_options(sequences, length, *calibrate, text)
    folder = model_folder(source)
    require_convertible(folder, options)
    require_target(target, folder)
    require_length(folder, length)
    tokens = text_tokens(folder, calibrate, sequences, length, seed=0, stage="Calibration text")
    count = max(sequences // 4, 8)
    held_out = (
        None if text is None else text_tokens(folder, [text], count, length, seed=EVAL_SEED, stage="Held-out text")
    )
    with progress("Convert") as on_progress:
        report = convert_checkpoint(folder, target, tokens, options, on_progress=on_progress)
    record = read_record(target)
    if "command" not in record:
        note(target, source=model_name(source.model or ""), **run_facts())
    if "healings" in record:
        console(stderr=True).print(f"{target} has been healed since: its report stays as it is")
    else:
        if held_out is not None:
            measured_on = {"text": text, "sequences": count, "length": length}
            note(target, quality=_quality(folder, target, held_out) | measured_on)
        if text is not None if speed is None else speed:
            note(target, speed=_speed(folder, target))
    record = read_record(target)
    if as_json:
        print_json({name: value for name, value in record.items() if name != "fingerprint"})
    else:
        _print_report(report, target, record)


def _quality(source: Path, converted: Path, tokens: Tensor) -> dict[str, Any]:
    from latentkv.convert.quality import compare_models

    with progress("Perplexity") as on_progress:
        found = compare_models(
            source,
            converted,
            tokens,
            on_progress=lambda done, total: on_progress("both models, sequences", done, total),
        )
    return {**found}


def _speed(source: Path, converted: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from latentkv.bench.models.decode_speed import measure_decode
    from latentkv.models.config_reader import read_config
    from latentkv.models.stored_config import stored_dtype

    with console(stderr=True).status("Decode speed"):
        dtype = stored_dtype(read_config(converted))
        return asdict(measure_decode({"source": source, "converted": converted}, dtype))


def _print_report(report: ConversionReport, target: Path, record: dict[str, Any]) -> None:
    from rich.table import Table

    from latentkv.convert import PAGE_FILE, REPORT_FILE, VLLM_LATENT_WIDTHS

    out = console()
    table = Table(title="what each layer lost", title_justify="left")
    for column in ("layer", "attention's error, %", "RoPE energy, %", "factors' energy, %", "stream's error, %"):
        table.add_column(column, justify="right")
    for row in report.layers:
        numbers = (row.output_error, row.rope_energy, row.kept_energy, row.stream_error)
        table.add_row(str(row.layer), *(f"{100 * number:.1f}" for number in numbers))
    out.print(table)
    share, cache = report.cached_after / report.cached_before, report.cache
    out.print(
        f"rank {report.rank} and {report.rope_dim} dimensions with RoPE: {report.cached_after} numbers a token and "
        f"layer, were {report.cached_before} ({share:.0%}); {cache.after:,} bytes a token, were {cache.before:,} "
        f"({cache.dtype}, all layers)"
    )
    if quality := record.get("quality"):
        out.print(
            f"perplexity  {quality['source']:.4g} before, {quality['converted']:.4g} after; "
            f"the likeliest token is the same for {quality['agreement']:.1%}"
        )
    if speed := record.get("speed"):
        before, after = (speed["tokens_per_second"][name] for name in ("source", "converted"))
        out.print(
            f"decode  {before:,.1f} tokens/s before, {after:,.1f} after, at {speed['depth']:,} tokens "
            f"({speed['dtype']}, {speed['threads']} thread{'s' if speed['threads'] > 1 else ''})"
        )
    out.print(f"for {', '.join(report.read_by)}, and no other engine")
    if report.export == "vllm" and report.cached_after not in VLLM_LATENT_WIDTHS:
        widths = ", ".join(map(str, VLLM_LATENT_WIDTHS))
        out.print(
            f"vLLM caches latents of {widths} numbers, not {report.cached_after}: with VLLM_MLA_DISABLE=1 it runs this "
            "model, and caches keys and values of every head"
        )
    out.print(
        f"{target}: all figures in {target / REPORT_FILE}, to be read in {target / PAGE_FILE}; "
        "latentkv heal wins quality back"
    )
