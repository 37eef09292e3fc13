"""Source folder -> quantised copy, file by file; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from latentkv.checkpoint.locate import CONFIG_FILE, INDEX_FILE
from latentkv.checkpoint.names import published_parts
from latentkv.checkpoint.shard import write_shard
from latentkv.errors import CheckpointError, OpError
from latentkv.files import write_json
from latentkv.quantize.importance import Importance
from latentkv.quantize.layout import CopyLayout, Part, plan_copy
from latentkv.quantize.report import QuantizationReport, ReportRow, squared_error
from latentkv.resumable import ResumableFolder
from latentkv.saved_values import as_saved
from latentkv.targets import require_folder
from latentkv.text.gguf_files import write_companions
from latentkv.weights.files.compressed_tensors import pack
from latentkv.weights.weight import quantize_weight, require_format

REPORT_FILE = "quantization_report.json"
MAX_SHARD_BYTES = 2 * 10**9


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
    folder = _resumable_folder(target)
    report = folder.finished(layout.fingerprint, QuantizationReport.from_json, layout.shards)
    if report is not None:
        return report
    _require_room(layout, target)
    with folder.claimed(layout.fingerprint):
        report = QuantizationReport.of(_convert(layout, folder, on_progress))
        _write_rest(layout, target, {"source": str(source), "weights": fmt, "group": group} | report.as_json())
        folder.finish(layout.config)
    return report


def require_target(target: Path) -> None:
    """Refuse, before any text is read, what no copy can be written to.

    Raises:
        CheckpointError: it is a file, not writable, or holds something else than a quantised copy.
    """
    require_folder(target, CheckpointError)
    _resumable_folder(target).require_free()


def _resumable_folder(target: Path) -> ResumableFolder:
    return ResumableFolder(target, state=".quantizing", report=REPORT_FILE, last=CONFIG_FILE, what="quantised copy")


def _require_room(layout: CopyLayout, target: Path) -> None:
    """Refuse, before it is anyone's, a folder on a disk too small."""
    missing = [part for name, parts in layout.shards.items() if not (target / name).exists() for part in parts]
    nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
    needed, free = sum(part.nbytes for part in missing), shutil.disk_usage(nearest).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: make room"
        )


def _convert(layout: CopyLayout, folder: ResumableFolder, on_progress: Callable[[int, int], object]) -> list[ReportRow]:
    """Write the files that are not there yet; rows of all of them."""
    total = sum(layout.reader.nbytes(name) for name in layout.reader.names)
    rows: list[ReportRow] = []
    for name, parts in layout.shards.items():
        done = sum(row.bytes_before for row in rows)
        if not (folder.path / name).is_file():
            (folder.state / f"{name}.json").unlink(missing_ok=True)
        rows += folder.step(
            f"{name}.json",
            partial(_write_parts, layout, parts, folder.path / name, lambda n, done=done: on_progress(done + n, total)),
            lambda rows: as_saved(QuantizationReport, {"rows": rows}).rows,
            remedy="remove it, and the same command makes it again",
        )
    on_progress(total, total)
    return rows


def _write_parts(
    layout: CopyLayout, parts: list[Part], path: Path, on_done: Callable[[int], object]
) -> list[dict[str, Any]]:
    """Write one file; its rows."""
    rows: list[ReportRow] = []
    entries = {stored: entry for part in parts for stored, entry in part.entries.items()}
    write_shard(path, entries, _converted(layout, parts, rows, on_done))
    return [asdict(row) for row in QuantizationReport.of(rows).rows]


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


def _write_rest(layout: CopyLayout, target: Path, report: dict[str, Any]) -> None:
    """Everything but weights and config.json."""
    write_companions(layout.reader.folder, target)
    if len(layout.shards) > 1:
        weight_map = {
            stored: name for name, parts in layout.shards.items() for part in parts for stored in part.entries
        }
        size = sum(part.nbytes for parts in layout.shards.values() for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)
    write_json(target / REPORT_FILE, {"fingerprint": layout.fingerprint} | report)
