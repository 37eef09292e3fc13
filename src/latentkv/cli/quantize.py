"""`latentkv quantize`: a copy of a checkpoint with fewer bits, a folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from latentkv.cli.flags import Preset
from latentkv.cli.loading import model_folder, use_threads
from latentkv.cli.terminal import console, print_json
from latentkv.errors import RequestError
from latentkv.option_types import Flag, TextFile
from latentkv.options import ModelName

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.prediction import Prediction
    from latentkv.quantize import Importance, QuantizationReport


def quantize(
    source: Annotated[ModelName, Preset(model=...)],
    target: Path,
    /,
    *,
    weights: str | None = None,
    kind: Annotated[str | None, Flag(("--type",))] = None,
    group: int | None = None,
    calibrate: TextFile | None = None,
    calibrate_bytes: int = 60_000,
    pre: str | None = None,
    text: TextFile | None = None,
    text_bytes: int = 100_000,
    threads: int | None = None,
    as_json: Annotated[bool, Flag(("--json",))] = False,
) -> None:
    """Make a copy of a checkpoint with fewer bits: a folder (compressed-tensors, int8 or int4), or a GGUF file.

    Each group's scale is searched for the least squared error. In a folder, routers, norms, embeddings and the latent
    projections (kv_a_proj_with_mqa, kv_b_proj, q_a_proj, eh_proj) stay as they are; the output head is int8, also with
    int4. An interrupted run goes on when the same command is given again. A GGUF file is written whole or not at all,
    for llama.cpp and LatentKV alike; of mixes such as q4_k, embedding, head and latent projections get more bits.
    Either is made of a folder, or of a GGUF file of F32, F16 or BF16.

    Example: latentkv quantize deepseek-ai/DeepSeek-V2-Lite v2-lite-int4 --weights int4

    Example: latentkv quantize deepseek-ai/DeepSeek-V2-Lite v2-lite-q4_k.gguf --type q4_k --calibrate book.txt

    Args:
        source: the model.
        target: a new folder for the copy, or a new .gguf file.
        weights: what a folder gets: int8, or int4 (its output head is int8).
        kind: what a .gguf file gets: q8_0, q6_k, q4_k, q4_0, mxfp4, or unquantised bf16, f16, f32.
        group: weights of a folder that share a scale: 32, 64 or 128; None is 128 in int4, a whole row in int8.
        calibrate: weigh errors by what the model does with this text.
        calibrate_bytes: how much of that text to read.
        pre: how a .gguf file says that texts are cut, in place of the tokenizer's own way; or none for no tokenizer.
        text: report the perplexity on this text, before and after.
        text_bytes: how much of the text to read.
        threads: CPU threads; None is all cores.
        as_json: print the report as JSON.
    """

    from latentkv.quantize import column_importance

    use_threads(threads)
    _require_options(target, weights, kind, group, pre, text)
    passage = None if text is None else _passage(text, text_bytes, "--text-bytes")
    calibration = None if calibrate is None else _passage(calibrate, calibrate_bytes, "--calibrate-bytes")
    folder = model_folder(source)
    write = _gguf_writer(folder, target, kind, pre) if kind else _folder_writer(folder, target, weights or "", group)
    importance = None
    if calibration is not None:
        with console(stderr=True).status(f"{folder.name} reads {calibrate}"):
            importance = column_importance(folder, calibration)
    before = None if passage is None else _predict(folder, passage)
    with _progress(f"{folder.name} to {kind or weights}") as on_progress:
        report, notes = write(importance, on_progress)
    measured = None
    if passage is not None and before is not None:
        measured = {"text": str(text), "before": asdict(before.perplexity), **_after(target, passage, before)}
        if not kind:
            _add_to_report(target, measured)
    if as_json:
        print_json(report.as_json() | {"perplexity": measured, "notes": list(notes)})
    else:
        _print_report(report, target, measured, notes)


def _require_options(
    target: Path, weights: str | None, kind: str | None, group: int | None, pre: str | None, text: Path | None
) -> None:
    """Refuse options of the other kind of target, and what cannot be had, before anything is read."""
    from latentkv.quantize import require_target
    from latentkv.quantize.gguf import GGUF_TYPES, NO_TOKENIZER, require_gguf_type, require_new_file
    from latentkv.weights.weight import require_format

    if target.suffix != ".gguf":
        for option, given in (("--type", kind), ("--pre", pre)):
            if given is not None:
                raise RequestError(
                    f"{option} is for a target that ends in .gguf: for the folder {target} say --weights int8 or "
                    "--weights int4."
                )
        if weights is None:
            raise RequestError(
                "Missing option '--weights': say --weights int8 or --weights int4 for a folder, or name a target that "
                "ends in .gguf and say --type."
            )
        require_format(weights, group)
        require_target(target)
        return
    for option, given in (("--weights", weights), ("--group", group)):
        if given is not None:
            raise RequestError(f"{option} is for a folder: for the GGUF file {target} say --type, such as --type q4_k.")
    if kind is None:
        raise RequestError(f"Missing option '--type': say what {target} is to hold, one of {', '.join(GGUF_TYPES)}.")
    if text is not None and pre == NO_TOKENIZER:
        raise RequestError(
            f"--text needs the tokenizer that --pre {NO_TOKENIZER} leaves out: leave out one of the two."
        )
    require_gguf_type(kind)
    require_new_file(target)


_Writer = Callable[["Importance | None", Callable[[int, int], None]], "tuple[QuantizationReport, tuple[str, ...]]"]


def _folder_writer(folder: Path, target: Path, weights: str, group: int | None) -> _Writer:
    from latentkv.quantize import quantize_checkpoint

    def write(
        importance: Importance | None, on_progress: Callable[[int, int], None]
    ) -> tuple[QuantizationReport, tuple[str, ...]]:
        report = quantize_checkpoint(folder, target, weights, group, importance=importance, on_progress=on_progress)
        return report, ()

    return write


def _gguf_writer(folder: Path, target: Path, kind: str, pre: str | None) -> _Writer:
    from latentkv.quantize.gguf import plan_gguf, write_gguf

    plan = plan_gguf(folder, kind, pre)

    def write(
        importance: Importance | None, on_progress: Callable[[int, int], None]
    ) -> tuple[QuantizationReport, tuple[str, ...]]:
        return write_gguf(plan, target, importance=importance, on_progress=on_progress), plan.notes

    return write


def _passage(path: Path, num_bytes: int, option: str) -> str:
    if num_bytes < 1:
        raise RequestError(f"{option} must be 1 or more, not {num_bytes}.")
    with path.open("rb") as file:
        passage = file.read(num_bytes).decode("utf-8", errors="ignore")
    if not passage:
        purpose = "score" if option == "--text-bytes" else "calibrate on"
        raise RequestError(f"{path} holds no text to {purpose}: name a file of UTF-8 text.")
    return passage


def _predict(folder: Path, passage: str) -> Prediction:
    from latentkv import LLM

    with console(stderr=True).status(f"Perplexity of {folder.name}"):
        return LLM(folder, packed_dir=None).predict(passage)


def _after(target: Path, passage: str, before: Prediction) -> dict[str, Any]:
    """Of the copy, and with activations of 8 bits where it runs on quantised weights (a float32 model does not)."""
    from latentkv import LLM
    from latentkv.models.packing import packed_weights

    with console(stderr=True).status(f"Perplexity of {target.name}"):
        exact = LLM(target, packed_dir=None)
        after = exact.predict(passage)
        measured = {"after": asdict(after.perplexity) | {"same_likeliest": after.agreement(before)}}
        if any(weight.rounding_input().rounds_input for weight in packed_weights(exact.decoder)):
            del exact
            rounded = LLM(target, packed_dir=None, activations="int8").predict(passage)
            same = {"same_likeliest": rounded.agreement(before), "same_likeliest_as_after": rounded.agreement(after)}
            measured["after, int8 activations"] = asdict(rounded.perplexity) | same
    return measured


@contextmanager
def _progress(title: str) -> Generator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _add_to_report(target: Path, measured: dict[str, Any]) -> None:
    from latentkv.errors import CheckpointError
    from latentkv.files import write_json
    from latentkv.json_files import read_json
    from latentkv.quantize import REPORT_FILE

    path = target / REPORT_FILE
    write_json(path, read_json(path, CheckpointError) | {"perplexity": measured})


def _print_report(
    report: QuantizationReport, target: Path, measured: dict[str, Any] | None, notes: tuple[str, ...]
) -> None:
    from latentkv.quantize import REPORT_FILE
    from latentkv.sizes import format_bytes

    out, total = console(), report.total
    if any(report.layer_errors.values()):  # a copy of the same numbers has none
        out.print(_layer_table(report))
    out.print(_kind_table(report))
    if measured is not None:
        before, after = measured["before"], measured["after"]
        out.print(
            f"perplexity  {before['perplexity']:.4g} before, {after['perplexity']:.4g} after "
            f"({after['bits_per_byte'] - before['bits_per_byte']:+.4f} bits a byte; {before['tokens']:,} tokens, "
            f"the likeliest one as before in {after['same_likeliest']:.1%})"
        )
        rounded = measured.get("after, int8 activations")
        if rounded is not None:
            out.print(
                f"            {rounded['perplexity']:.4g} with --activations int8 "
                f"({rounded['bits_per_byte'] - before['bits_per_byte']:+.4f} bits a byte; the likeliest as before in "
                f"{rounded['same_likeliest']:.1%}, as without it in {rounded['same_likeliest_as_after']:.1%})"
            )
    for note in notes:
        out.print(f"note: {note}")
    figures = "--json prints them" if target.suffix == ".gguf" else target / REPORT_FILE
    out.print(
        f"{target}: {format_bytes(total.bytes_after)}, was {format_bytes(total.bytes_before)}; "
        f"{total.bits_per_weight:.2f} bits a weight. All figures: {figures}"
    )


def _layer_table(report: QuantizationReport) -> Table:
    """Relative error of the quantised weights, a line for each layer and a column for each kind."""
    from rich.table import Table

    kinds = sorted({kind for errors in report.layer_errors.values() for kind in errors})
    table = Table(title="relative error ||W - Wq|| / ||W||, %", title_justify="left")
    for column in ("layer", *kinds):
        table.add_column(column, justify="right")
    for layer, errors in report.layer_errors.items():
        table.add_row(str(layer), *(f"{100 * errors[kind]:.2f}" if kind in errors else "" for kind in kinds))
    return table


def _kind_table(report: QuantizationReport) -> Table:
    from rich.table import Table

    from latentkv.sizes import format_bytes

    table = Table("weights", "stored as")
    for column in ("tensors", "parameters", "before", "after", "bits a weight", "error, %"):
        table.add_column(column, justify="right")
    for row in report.by_kind:
        error = f"{100 * row.relative_error:.2f}" if row.squared_norm else ""
        sizes = format_bytes(row.bytes_before), format_bytes(row.bytes_after)
        counts = f"{row.tensors:,}", f"{row.parameters:,}"
        table.add_row(row.kind, row.format, *counts, *sizes, f"{row.bits_per_weight:.2f}", error)
    return table
