"""Where a converted model is written, file by file, so that an interrupted conversion goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from latentkv.checkpoint.locate import CONFIG_FILE
from latentkv.checkpoint.names import empty_shared_experts
from latentkv.checkpoint.reader import INDEX_FILE, CheckpointReader
from latentkv.checkpoint.shard import write_shard
from latentkv.convert.record import REPORT_FILE, write_record
from latentkv.convert.report import ConversionReport
from latentkv.convert.source import SourceModel
from latentkv.errors import CheckpointError
from latentkv.files import write_json
from latentkv.resumable import ResumableFolder
from latentkv.saved_values import saved_in
from latentkv.targets import require_folder
from latentkv.text.gguf_files import write_companions


def require_target(folder: Path, source: Path) -> None:
    """Refuse, before any text is read, what no conversion can be written to.

    Raises:
        CheckpointError: it is the source, a file, not writable, or holds something else than a conversion.
    """
    require_folder(folder, CheckpointError, apart=[("the source", source)])
    resumable_folder(folder).require_free()


def resumable_folder(folder: Path) -> ResumableFolder:
    """A folder that is, or is to be, some conversion's."""
    return ResumableFolder(folder, state=".converting", report=REPORT_FILE, last=CONFIG_FILE, what="converted model")


class TargetFolder:
    """The files of a converted model, but for config.json.

    Args:
        folder: that they are written to.
        source: what is converted.
        fingerprint: tells this conversion from every other.
        dtype: of the copy's weights.
        tied: whether the copy's head is its embedding; if it is not, it has a head of its own.
    """

    def __init__(
        self, folder: ResumableFolder, source: SourceModel, fingerprint: str, dtype: torch.dtype, *, tied: bool
    ) -> None:
        self._folder, self._remedy = folder.path, folder.remedy
        self._source = source
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._tied = tied

    def write_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """The file of a layer: what is given, and what else there is but attention as in the source, one by one.

        Args:
            index: of the layer.
            tensors: {name in the layer: tensor}; those of attention, and others instead of the source's.
        """
        prefix = f"model.layers.{index}."
        converted = {f"{prefix}{name}": tensor.to(self._dtype) for name, tensor in tensors.items()}
        names = [name for name in self._source.layer_names(index) if ".self_attn." not in name]
        copied = [name for name in names if name not in converted]
        empty = self._empty_experts(index)
        entries = {name: (self._dtype, self._source.shapes[name]) for name in copied}
        entries |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in (converted | empty).items()}
        read = ((name, self._source.folded(name, self._dtype)) for name in copied)
        write_shard(self._folder / self._shard(index), entries, chain(converted.items(), empty.items(), read))

    def read_layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """(name in the layer, float32 tensor) of what was written, one at a time."""
        path = self._folder / self._shard(index)
        with saved_in(path, CheckpointError, self._remedy), safe_open(path, framework="pt") as file:
            for name in file.keys() - self._empty_experts(index).keys():
                yield name.removeprefix(f"model.layers.{index}."), file.get_tensor(name).float()

    def _empty_experts(self, index: int) -> dict[str, Tensor]:
        """The shared experts that transformers looks for in a layer with experts, and that have no width."""
        config = self._source.config
        if config.layers[index].moe is None:
            return {}
        return empty_shared_experts(f"model.layers.{index}.mlp", config.hidden_size, self._dtype)

    def write_rest(self, report: ConversionReport) -> None:
        """Everything but the layers and config.json, without which nobody reads it."""
        self._write_outer()
        write_companions(self._source.reader.folder, self._folder)
        shards = [self._shard(index) for index in range(self._source.config.num_layers + 1)]
        weight_map: dict[str, str] = {}
        for shard in shards:
            path = self._folder / shard
            with saved_in(path, CheckpointError, self._remedy), safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), shard)
        size = sum((self._folder / shard).stat().st_size for shard in shards)
        write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        CheckpointReader(self._folder)  # every header once more, before the folder counts as a model
        about = {"fingerprint": self._fingerprint, "source": self._source.reader.folder.name}
        write_record(self._folder, about | report.as_json())

    def _write_outer(self) -> None:
        """Embedding, last norm and head as they are; a head that is the embedding once more where it is to be apart."""
        source = self._source
        path = self._folder / self._shard(source.config.num_layers)
        if path.exists():
            return
        origins = {name: name for name in source.outer_names()}
        if source.config.tie_word_embeddings:
            origins["lm_head.weight"] = "model.embed_tokens.weight"
        if self._tied:
            origins.pop("lm_head.weight")
        entries = {name: (self._dtype, source.shapes[origin]) for name, origin in origins.items()}
        write_shard(
            path, entries, ((name, source.folded(name, self._dtype, origin)) for name, origin in origins.items())
        )

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self._source.config.num_layers + 1:05d}.safetensors"
