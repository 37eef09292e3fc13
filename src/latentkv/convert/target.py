"""`TargetFolder`: where a converted model is written, file by file, so that an interrupted conversion goes on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentkv.checkpoint.locate import CONFIG_FILE
from latentkv.checkpoint.reader import INDEX_FILE, CheckpointReader
from latentkv.checkpoint.shard import write_shard
from latentkv.convert.record import REPORT_FILE, write_record
from latentkv.convert.report import ConversionReport
from latentkv.convert.source import SourceModel
from latentkv.errors import CheckpointError
from latentkv.files import sync, write_json
from latentkv.json_files import read_any_json, read_json
from latentkv.saved_values import saved_in
from latentkv.targets import require_folder
from latentkv.text.gguf_files import write_companions

_STATE, _CLAIM = ".converting", "conversion.json"
_REMEDY = "remove the folder of the converted model and convert again"


def require_target(folder: Path, source: Path) -> None:
    """Refuse, before any text is read, what no conversion can be written to.

    Raises:
        CheckpointError: it is the source, a file, not writable, or holds something else than a conversion.
    """
    require_folder(folder, CheckpointError, apart=[("the source", source)])
    if not folder.is_dir():
        return
    begun = (folder / _STATE / _CLAIM).is_file()
    finished = (folder / REPORT_FILE).is_file() and (folder / CONFIG_FILE).is_file()
    if not begun and not finished and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty: name a new folder for the converted model")


class TargetFolder:
    """A folder that belongs to one conversion.

    Args:
        folder: made if need be.
        source: what is converted.
        fingerprint: tells this conversion from every other.
        dtype: of the copy's weights.
        tied: whether the copy's head is its embedding; if it is not, it has a head of its own.
    """

    def __init__(self, folder: Path, source: SourceModel, fingerprint: str, dtype: torch.dtype, *, tied: bool) -> None:
        self.folder = folder
        self.state = folder / _STATE
        self._source = source
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._tied = tied

    def finished(self) -> ConversionReport | None:
        """The report, where this very conversion is complete."""
        path = self.folder / REPORT_FILE
        if not (path.is_file() and (self.folder / CONFIG_FILE).is_file()):
            return None
        with saved_in(path, CheckpointError, _REMEDY):
            content = read_json(path, CheckpointError, remedy=_REMEDY)
            if content.pop("fingerprint", None) != self._fingerprint:
                return None
        shutil.rmtree(self.state, ignore_errors=True)
        with saved_in(path, CheckpointError, _REMEDY):
            return ConversionReport.from_json(content)

    def claim(self) -> None:
        """Make the folder this conversion's own; refuse one that is another's."""
        state = self.state / _CLAIM
        if state.is_file():
            with saved_in(state, CheckpointError, _REMEDY):
                claimed = read_any_json(state, CheckpointError, remedy=_REMEDY)
            if claimed != self._fingerprint:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished conversion of another source, or with other options: remove it"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise CheckpointError(f"{self.folder} exists and is not empty: name a new folder for the converted model")
        self.state.mkdir(parents=True, exist_ok=True)
        write_json(state, self._fingerprint)

    def write_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """The file of a layer."""
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_shard(self.folder / self._shard(index), entries, tensors.items())

    def finish(self, config: Mapping[str, Any], report: ConversionReport) -> None:
        """Everything but the layers; config.json, without which nobody reads the rest, comes last."""
        self._write_outer()
        write_companions(self._source.reader.folder, self.folder)
        shards = [self._shard(index) for index in range(self._source.config.num_layers + 1)]
        weight_map: dict[str, str] = {}
        for shard in shards:
            path = self.folder / shard
            with saved_in(path, CheckpointError, _REMEDY), safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), shard)
        size = sum((self.folder / shard).stat().st_size for shard in shards)
        write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        CheckpointReader(self.folder)  # every header once more, before the folder counts as a model
        about = {"fingerprint": self._fingerprint, "source": self._source.reader.folder.name}
        write_record(self.folder, about | report.as_json())
        write_json(self.folder / CONFIG_FILE, config)
        sync(self.folder)
        shutil.rmtree(self.state, ignore_errors=True)

    def _write_outer(self) -> None:
        """Embedding, last norm and head as they are; a head that is the embedding once more where it is to be apart."""
        source = self._source
        path = self.folder / self._shard(source.config.num_layers)
        if path.exists():
            return
        origins = {name: name for name in source.outer_names()}
        if source.config.tie_word_embeddings:
            origins["lm_head.weight"] = "model.embed_tokens.weight"
        if self._tied:
            origins.pop("lm_head.weight")
        entries = {name: (self._dtype, source.reader.shape(source.stored_as[origins[name]])) for name in origins}
        write_shard(path, entries, ((name, source.read(origin).to(self._dtype)) for name, origin in origins.items()))

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self._source.config.num_layers + 1:05d}.safetensors"
