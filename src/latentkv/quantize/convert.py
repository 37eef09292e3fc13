"""Source folder -> quantised copy, file by file; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from latentkv.checkpoint.locate import CONFIG_FILE, INDEX_FILE
from latentkv.checkpoint.names import published_parts
from latentkv.checkpoint.shard import write_shard
from latentkv.errors import CheckpointError, OpError
from latentkv.files import sync, write_json
from latentkv.json_files import read_any_json, read_json
from latentkv.quantize.importance import Importance
from latentkv.quantize.layout import CopyLayout, Part, plan_copy
from latentkv.quantize.report import QuantizationReport, ReportRow, squared_error
from latentkv.saved_values import as_saved, saved_in
from latentkv.text.gguf_files import write_companions
from latentkv.weights.files.compressed_tensors import pack
from latentkv.weights.weight import quantize_weight, require_format

REPORT_FILE = "quantization_report.json"
MAX_SHARD_BYTES = 2 * 10**9

# What a run that is under way has finished; gone when the copy is complete.
_STATE = ".quantizing"
_REMEDY = "remove the folder of the copy and quantize again"
_AGAIN = "remove it, and the same command makes it again"


def quantize_checkpoint(
    source: Path,
    target: Path,
    fmt: str,
    group: int | None = None,
    *,
    importance: Importance | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> QuantizationReport:
    """Write a quantised copy of a checkpoint that other engines load too (compressed-tensors, "pack-quantized").

    `weights.policy` says what is quantised. Memory holds a few tensors at a time. Each file gets its name when it
    is whole and on disk, config.json last; the same call after an interruption goes on with the first missing file.

    Args:
        source: folder of a supported model, unquantised or DeepSeek's float8; or a GGUF file of plain types.
        target: folder, made if need be; empty, or of an interrupted or finished run of the same conversion.
        fmt: name of one of `weights.formats.ROUNDED_TO` (the output head is int8 either way).
        group: inputs that share a scale: 32, 64 or 128; None: the format's own default.
        importance: what the squared error of each column counts where scales are looked for, by published names
            (`importance.column_importance`); weights that it lacks count theirs alike.
        max_shard_bytes: a file holds no more, unless a single tensor does.
        on_progress: called with the bytes of the source that are done, and all of them.

    Returns:
        Errors and bytes; REPORT_FILE in `target` holds the same.

    Raises:
        ConfigError: the model is not supported.
        CheckpointError: the source is damaged, quantised already, or holds NaN or infinity (with the tensor's name);
            the target holds something else, or cannot be written.
        OpError: unknown format or group.
    """
    layout = plan_copy(source, require_format(fmt, group), group, max_shard_bytes, importance)
    try:
        report = _finished_report(target, layout)
        if report is None:
            _claim(target, layout)
            report = QuantizationReport.of(_convert(layout, target, on_progress))
            _finish(layout, target, {"source": str(source), "weights": fmt, "group": group} | report.as_json())
        shutil.rmtree(target / _STATE, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}): what is finished stays, the same command goes on"
        ) from error
    return report


def _finished_report(target: Path, layout: CopyLayout) -> QuantizationReport | None:
    """The report of a complete copy that this very conversion made; None where there is none."""
    if not all((target / name).is_file() for name in (REPORT_FILE, CONFIG_FILE, *layout.shards)):
        return None
    with saved_in(target / REPORT_FILE, CheckpointError, _REMEDY):
        content = read_json(target / REPORT_FILE, CheckpointError, remedy=_REMEDY)
        return QuantizationReport.from_json(content) if content.get("fingerprint") == layout.fingerprint else None


def _claim(target: Path, layout: CopyLayout) -> None:
    """Make the folder this conversion's own; refuse one that is another's, or on a disk too small."""
    state = target / _STATE / "conversion.json"
    if state.is_file():
        with saved_in(state, CheckpointError, _REMEDY):
            claimed = read_any_json(state, CheckpointError, remedy=_REMEDY)
        if claimed != layout.fingerprint:
            raise CheckpointError(
                f"{target} holds an unfinished copy of another source, or with other options: remove it first"
            )
    elif target.exists() and (not target.is_dir() or any(path.name != _STATE for path in target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty: name a new folder for the quantised copy")
    state.parent.mkdir(parents=True, exist_ok=True)
    missing = [part for name, parts in layout.shards.items() if not (target / name).exists() for part in parts]
    needed, free = sum(part.nbytes for part in missing), shutil.disk_usage(target).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: make room"
        )
    write_json(state, layout.fingerprint)


def _convert(layout: CopyLayout, target: Path, on_progress: Callable[[int, int], object]) -> list[ReportRow]:
    """Write the files that are not there yet; rows of all of them."""
    total = sum(layout.reader.nbytes(name) for name in layout.reader.names)
    rows: list[ReportRow] = []
    for name, parts in layout.shards.items():
        done = sum(row.bytes_before for row in rows)
        state = target / _STATE / f"{name}.json"
        if not (state.is_file() and (target / name).is_file()):
            own: list[ReportRow] = []
            entries = {stored: entry for part in parts for stored, entry in part.entries.items()}
            tensors = _converted(layout, parts, own, lambda n, done=done: on_progress(done + n, total))
            write_shard(target / name, entries, tensors)
            write_json(state, [asdict(row) for row in QuantizationReport.of(own).rows])
        with saved_in(state, CheckpointError, _AGAIN):
            rows += as_saved(
                QuantizationReport,
                {
                    "rows": read_any_json(
                        state, CheckpointError, remedy="remove it, and the same command makes it again"
                    )
                },
            ).rows
    on_progress(total, total)
    return rows


def _converted(
    layout: CopyLayout, parts: list[Part], rows: list[ReportRow], on_done: Callable[[int], object]
) -> Iterator[tuple[str, Tensor]]:
    """What a file holds, tensor by tensor; `rows` gets one for each part, `on_done` the source's bytes so far."""
    done = 0
    for source, pieces in groupby(parts, key=lambda part: part.source):
        before = layout.reader.nbytes(source) / math.prod(layout.reader.shape(source) or (1,))
        stored = layout.reader.read(source)
        tensors = dict(published_parts(source, stored, layout.num_layers))
        for part in pieces:
            tensor = tensors.get(part.name, stored)
            row, converted = _convert_part(part, tensor, round(before * tensor.numel()), layout.importance)
            yield from converted.items()
            rows.append(row)
            done += row.bytes_before
            on_done(done)


def _convert_part(
    part: Part, tensor: Tensor, bytes_before: int, importance: Importance
) -> tuple[ReportRow, dict[str, Tensor]]:
    error = norm = 0.0
    if part.scheme is None:
        stored, form = {part.name: tensor.to(part.dtype)}, str(part.dtype).removeprefix("torch.")
    else:
        try:
            counted = importance.get(part.published)
            quantized = quantize_weight(tensor, part.scheme.format, part.scheme.group, counted)
        except OpError as problem:
            raise CheckpointError(f"{part.name} cannot be quantised: {problem}") from problem
        stored = {part.name + suffix: piece for suffix, piece in pack(quantized).items()}
        error, norm = squared_error(tensor, quantized)
        form = f"{part.scheme.format.name}, " + (f"groups of {part.scheme.group}" if part.scheme.group else "rows")
    row = ReportRow(part.layer, part.kind, form, 1, tensor.numel(), bytes_before, part.nbytes, error, norm)
    return row, stored


def _finish(layout: CopyLayout, target: Path, report: dict[str, Any]) -> None:
    """Everything but weights; config.json, without which nobody reads the rest, comes last."""
    write_companions(layout.reader.folder, target)
    if len(layout.shards) > 1:
        weight_map = {
            stored: name for name, parts in layout.shards.items() for part in parts for stored in part.entries
        }
        size = sum(part.nbytes for parts in layout.shards.values() for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)
    write_json(target / REPORT_FILE, {"fingerprint": layout.fingerprint} | report)
    write_json(target / CONFIG_FILE, layout.config)
    if os.name == "posix":
        sync(target)
