"""What a quantised copy will hold, file by file, settled from the source's headers before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentkv.checkpoint.locate import SINGLE_FILE
from latentkv.checkpoint.names import layer_of, published_parts, tensor_kind, text_model_names
from latentkv.checkpoint.shard import Entry, entry_bytes
from latentkv.checkpoint.tensors import Tensors
from latentkv.checkpoint.wrapper import without
from latentkv.errors import CheckpointError
from latentkv.fingerprint import file_states, fingerprint
from latentkv.models.stored_config import open_checkpoint
from latentkv.quantize.importance import Importance
from latentkv.weights import CodeFormat
from latentkv.weights.files.compressed_config import build_config
from latentkv.weights.files.compressed_tensors import packed_layout
from latentkv.weights.policy import WeightScheme, choose_scheme


@dataclass(frozen=True)
class Part:
    """One tensor of the copy.

    Attributes:
        name: in the copy.
        published: the name that it is known by; "": none.
        source: the tensor that it is made from; several experts may come from one.
        dtype, shape: of the tensor, where it stays as it is.
        scheme: how it is quantised; None: it stays.
        layer: that it belongs to; None: none.
        kind: what it is part of ("attention", "routed experts", ...).
    """

    name: str
    published: str
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scheme: WeightScheme | None
    layer: int | None
    kind: str

    @property
    def entries(self) -> dict[str, Entry]:
        """What is stored for it."""
        if self.scheme is None:
            return {self.name: (self.dtype, self.shape)}
        rows, columns = self.shape
        return {self.name + part: entry for part, entry in packed_layout((rows, columns), self.scheme).items()}

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the copy."""
        return sum(map(entry_bytes, self.entries.values()))


@dataclass(frozen=True)
class CopyLayout:
    """A quantised copy.

    Attributes:
        reader: of the source.
        num_layers: of the model.
        shards: the parts of each file, by its name.
        config: content of config.json.
        fingerprint: tells this source with these options from every other.
        importance: what each column's error counts, by published names.
    """

    reader: Tensors
    num_layers: int
    shards: dict[str, list[Part]]
    config: dict[str, Any]
    fingerprint: str
    importance: Importance


def plan_copy(
    folder: Path, fmt: CodeFormat, group: int | None, max_shard_bytes: int, importance: Importance | None = None
) -> CopyLayout:
    """Settle what a quantised copy holds.

    Raises:
        ConfigError: the model is not supported.
        CheckpointError: the source's files are damaged, or quantised already.
    """
    config, reader = open_checkpoint(folder)
    refuse_quantized(reader)
    parts = list(_parts(reader, config.num_layers, fmt, group, keeps_head=config.tie_word_embeddings))
    schemes = {_module(part): part.scheme for part in parts if part.scheme is not None}
    if not schemes:
        raise CheckpointError(f"{folder} holds no weight that could be quantised: is it a language model's?")
    kept = [_module(part) for part in parts if part.scheme is None and _is_linear(part)]
    raw = without(config.source, "quantization_config")
    raw["quantization_config"] = build_config(schemes, kept)
    counted = importance or {}
    decides = [file_states(reader.files), raw, max_shard_bytes]
    columns = (name.encode() + column.numpy().tobytes() for name, column in sorted(counted.items()))
    return CopyLayout(
        reader=reader,
        num_layers=config.num_layers,
        shards=_named_shards(list(_shards(parts, max_shard_bytes))),
        config=raw,
        fingerprint=fingerprint([decides, *columns]),
        importance=counted,
    )


def refuse_quantized(reader: Tensors) -> None:
    """Raise `CheckpointError` if a checkpoint holds quantised weights already."""
    for name in reader.names:
        if reader.is_quantized(name):
            raise CheckpointError(
                f"{reader.folder} is quantised already ({name} is {reader.shown_dtype(name)}): quantise the original "
                "weights"
            )


def _parts(reader: Tensors, num_layers: int, fmt: CodeFormat, group: int | None, *, keeps_head: bool) -> Iterator[Part]:
    names = text_model_names(reader.names, nested=reader.nests_text_model)
    published = {name: known_as for known_as, name in names.items()}
    for source in reader.names:
        stored = torch.empty(reader.shape(source), dtype=reader.dtype(source), device="meta")
        known_as = published.get(source)  # None: not of the text model
        scheme = None if known_as is None else choose_scheme(known_as, stored.shape, fmt, group)
        if known_as == "lm_head.weight" and keeps_head:
            scheme = None  # a copy of the embedding, as which it is recognised
        # What was float8 is stored dequantised where it is not quantised again.
        is_float8 = stored.is_floating_point() and stored.itemsize == 1
        dtype = torch.bfloat16 if is_float8 else stored.dtype
        pieces = published_parts(source, stored, num_layers) if scheme else [(source, stored)]
        layer, kind = layer_of(known_as or ""), tensor_kind(known_as or "")
        for name, piece in pieces:
            yield Part(
                name, _published_part(name, source, known_as), source, dtype, tuple(piece.shape), scheme, layer, kind
            )


def _published_part(name: str, source: str, known_as: str | None) -> str:
    """What a part of a source is known by: its own name, but for what stands before the text model's."""
    if known_as is None:
        return ""
    before = source.removesuffix(known_as.removeprefix("model."))
    return known_as if name == source else "model." + name.removeprefix(before)


def _module(part: Part) -> str:
    return part.name.removesuffix(".weight")


def _is_linear(part: Part) -> bool:
    """Whether other engines see a linear layer in it, which they are to be told to leave alone."""
    return part.name.endswith(".weight") and len(part.shape) == 2 and part.kind != "embedding"


def _shards(parts: list[Part], max_bytes: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    yield shard


def _named_shards(shards: list[list[Part]]) -> dict[str, list[Part]]:
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}
