"""A checkpoint -> one GGUF file, tensor by tensor; it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.checkpoint.source import model_name
from latentkv.checkpoint.tensors import Tensors
from latentkv.errors import CheckpointError, OpError
from latentkv.files import sync, write_whole
from latentkv.models.loading import match_weights
from latentkv.models.stored_config import open_checkpoint
from latentkv.quantize.gguf.metadata import FREQUENCY_DIVISORS, config_metadata, require_said
from latentkv.quantize.gguf.mix import choose_type, file_type, require_gguf_type
from latentkv.quantize.gguf.tensors import Planned, plan_tensors
from latentkv.quantize.gguf.vocabulary import vocabulary_metadata
from latentkv.quantize.importance import Importance
from latentkv.quantize.layout import refuse_quantized
from latentkv.quantize.report import QuantizationReport, ReportRow
from latentkv.targets import require_folder
from latentkv.weights.gguf.encoding import encode
from latentkv.weights.gguf.types import TensorType, dequantize

ALIGNMENT = 32
"""Each tensor begins at a multiple of so many bytes, which is what a file that does not say has."""

_QUANTIZATION_VERSION = 2
_WEIGHTS_AT_A_TIME = 1 << 20
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFPlan:
    """A checkpoint's GGUF file before it is written.

    Attributes:
        reader: of the checkpoint.
        tensors: what the file will hold, in order.
        values: its metadata.
        divisors: of the rotary frequencies, where one of the tensors holds them.
        notes: what people should know of the file, a sentence each.
    """

    reader: Tensors
    tensors: Sequence[Planned]
    values: Mapping[str, Any]
    divisors: Tensor | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors)


def plan_gguf(source: Path, asked: str, pre: str | None = None) -> GGUFPlan:
    """Settle what a checkpoint's GGUF file holds; of the weights only headers are read.

    Args:
        source: folder of a supported model, unquantised or DeepSeek's float8; or a GGUF file of plain types.
        asked: one of `mix.GGUF_TYPES`; which tensors get it, `mix.choose_type` says.
        pre: see `vocabulary_metadata`.

    Raises:
        ConfigError: the model is not supported.
        CheckpointError: the source is damaged or quantised already; GGUF cannot say what it computes.
        TokenizerError: GGUF cannot say what its tokenizer does.
        OpError: unknown type.
    """
    require_gguf_type(asked)
    config, reader = open_checkpoint(source)
    refuse_quantized(reader)
    match_weights(config, reader)
    metadata = config_metadata(config)
    tensors = plan_tensors(config, reader, metadata.architecture)
    if metadata.divisors is not None:
        shape = tuple(metadata.divisors.shape)
        tensors.insert(0, Planned(FREQUENCY_DIVISORS, shape, (), torch.float32, 0, None, "rotary embedding"))
    require_said(config, metadata, {tensor.name: tensor.shape for tensor in tensors})
    vocabulary = vocabulary_metadata(source, config, pre)
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": model_name(source),
        "general.file_type": file_type(asked),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **metadata.values,
        **vocabulary.values,
    }
    typed = [
        tensor.typed(choose_type(tensor.name, tensor.shape, asked, tensor.dtype, config.num_layers))
        for tensor in tensors
    ]
    return GGUFPlan(reader, typed, values, metadata.divisors, metadata.notes + vocabulary.notes)


def write_gguf(
    plan: GGUFPlan,
    target: Path,
    *,
    importance: Importance | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> QuantizationReport:
    """Write a GGUF file, which gets its name when it is whole and on disk.

    Memory holds a few tensors at a time, of experts one.

    Args:
        plan: of the file.
        target: of the file, which must not exist; its folder is made if need be.
        importance: what the squared error of each column counts where scales are looked for, by published names;
            weights that it lacks count theirs alike.
        on_progress: called with the bytes of the source that are done, and all of them.

    Returns:
        Errors and bytes; the formats are the types of GGUF.

    Raises:
        CheckpointError: the source is damaged, or holds NaN or infinity (with the tensor's name); the target exists, or
            cannot be written.
    """
    require_new_file(target)
    file = _File(plan, importance or {}, on_progress)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if plan.nbytes > free:
            raise CheckpointError(
                f"{target} needs {plan.nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: make room"
            )
        write_whole(target, file.write)
        if os.name == "posix":
            sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}), and nothing is left of it: make room, or name "
            "another place"
        ) from error
    return QuantizationReport.of(file.rows)


def require_new_file(target: Path) -> None:
    """Raise `CheckpointError` unless a file can be made there: nothing is replaced."""
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a new file, or remove it first")
    require_folder(target.parent, CheckpointError)


class _File:
    """One file in the making; `rows` is what the report says of it."""

    def __init__(self, plan: GGUFPlan, importance: Importance, on_progress: Callable[[int, int], object]) -> None:
        self.rows: list[ReportRow] = []
        self._plan, self._importance, self._on_progress = plan, importance, on_progress

    def write(self, path: Path) -> None:
        """Write all of it."""
        _write_header(path, self._plan)
        total, done = sum(tensor.bytes_before for tensor in self._plan.tensors), 0
        with path.open("ab") as file, _workers() as pool:
            for tensor in self._plan.tensors:
                file.write(bytes(-file.tell() % ALIGNMENT))
                error = norm = 0.0
                for raw, squares in self._encoded(tensor, pool):
                    file.write(raw.numpy().data)
                    error, norm = error + squares[0], norm + squares[1]
                done += tensor.bytes_before
                self._on_progress(done, total)
                self.rows.append(_row(tensor, error, norm))
            file.write(bytes(-file.tell() % ALIGNMENT))

    def _encoded(self, tensor: Planned, pool: Executor) -> Iterator[tuple[Tensor, tuple[float, float]]]:
        """A tensor's bytes, some rows at a time, and the sums of their squared errors and weights."""
        kind = _kind(tensor)
        for published, matrix in self._matrices(tensor):
            rows, importance = matrix.reshape(-1, matrix.shape[-1]), self._importance.get(published)
            parts = rows.split(max(1, _WEIGHTS_AT_A_TIME // rows.shape[1]))
            try:
                yield from pool.map(partial(_encode, kind=kind, importance=importance), parts)
            except OpError as problem:
                raise CheckpointError(f"{published or tensor.name} cannot be written: {problem}") from problem

    def _matrices(self, tensor: Planned) -> Iterator[tuple[str, Tensor]]:
        if not tensor.sources and self._plan.divisors is not None:
            yield "", self._plan.divisors
        for source in tensor.sources:
            yield from source.matrices(self._plan.reader)


@contextmanager
def _workers() -> Generator[Executor]:
    """As many threads as torch has, each of which computes alone.

    The search for scales is thousands of small operations: a team of torch's would wait for its slowest member after
    each, which takes ten times as long and more where another program wants the cores.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _encode(exact: Tensor, kind: TensorType, importance: Tensor | None) -> tuple[Tensor, tuple[float, float]]:
    """Bytes of rows, and the sums of squares of their errors and of their weights."""
    raw = encode(exact, kind, importance)
    return raw, (0.0, 0.0) if _PLAIN.get(kind.name) == exact.dtype else _squares(exact, raw, kind)


def _kind(tensor: Planned) -> TensorType:
    if tensor.chosen is None:
        raise RuntimeError(f"{tensor.name} has no type yet")
    return tensor.chosen.type


def _squares(exact: Tensor, raw: Tensor, kind: TensorType) -> tuple[float, float]:
    weights = exact.float()
    norm = torch.linalg.vector_norm(weights).item() ** 2
    return torch.linalg.vector_norm(dequantize(raw, kind).sub_(weights)).item() ** 2, norm


def _row(tensor: Planned, error: float, norm: float) -> ReportRow:
    form, meant = _kind(tensor).name, tensor.chosen.instead_of if tensor.chosen is not None else None
    if meant is not None:
        form += f" (not {meant}, at a width of {tensor.shape[-1]})"
    if not error:  # nothing was rounded
        norm = 0.0
    return ReportRow(
        tensor.layer, tensor.kind, form, 1, tensor.parameters, tensor.bytes_before, tensor.nbytes, error, norm
    )


def _write_header(path: Path, plan: GGUFPlan) -> None:
    """Everything before the tensors' bytes, as the gguf package writes it."""
    # Imported here: it is slow to import, and only this needs it.
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, plan.values["general.architecture"])
    for key, value in plan.values.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                if key != "general.architecture":  # which it has added itself
                    writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for tensor in plan.tensors:
        kind = GGMLQuantizationType(_kind(tensor).id)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
