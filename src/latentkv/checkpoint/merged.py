"""`MergedTensors`: a model's tensors with a LoRA adapter added as they are read, before anything is packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from latentkv.checkpoint.adapter import Adapter, Update
from latentkv.checkpoint.gguf.tensors import is_gguf
from latentkv.checkpoint.names import text_model_names
from latentkv.checkpoint.tensors import Tensors
from latentkv.errors import CheckpointError
from latentkv.weights.files.dtypes import short_name
from latentkv.weights.weight import QuantizedWeight

T = TypeVar("T")

_TIED = ("lm_head.weight", "model.embed_tokens.weight")


class MergedTensors:
    """See `checkpoint.tensors.Tensors`: those of a model, some of them changed by an adapter.

    A changed weight is computed in float32 and rounded once, to the dtype that it is asked for in.

    Args:
        base: the model's.
        adapter: what changes them.
        tied: the output head is the embedding.

    Attributes:
        folder: the model's.
        nests_text_model: as the model's.

    Raises:
        CheckpointError: the model has no such weights, they have other shapes or are stored as integers, or the adapter
            would part a head and an embedding that are one.
    """

    def __init__(self, base: Tensors, adapter: Adapter, *, tied: bool) -> None:
        self.folder = base.folder
        self.nests_text_model = base.nests_text_model
        self._base = base
        self._adapter = adapter
        self._tied = tied
        if is_gguf(base.folder):
            raise CheckpointError(
                f"{base.folder} is a GGUF file, into which {adapter.folder} is not merged: name the model's original "
                "release in safetensors."
            )
        published = text_model_names(base.names, nested=base.nests_text_model, tied=tied)
        self._updates: Mapping[str, Update] = self._by_source(adapter.updates, published)
        self._replacements: Mapping[str, str] = self._by_source(adapter.replacements, published)
        for source, update in self._updates.items():
            self._require_fits(source, update.shape, f"{update.b} times {update.a}")
        for source, name in self._replacements.items():
            self._require_fits(source, adapter.shape(name), name)

    @property
    def names(self) -> tuple[str, ...]:
        """As the model's."""
        return self._base.names

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's files, and the adapter's: all that the weights depend on."""
        return *self._base.files, *self._adapter.files

    @property
    def notes(self) -> tuple[str, ...]:
        """As the model's."""
        return self._base.notes

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        """As the model's."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As the model's."""
        return self._base.dtype(name)

    def shown_dtype(self, name: str) -> str:
        """As the model's."""
        return self._base.shown_dtype(name)

    def nbytes(self, name: str) -> int:
        """As the model's."""
        return self._base.nbytes(name)

    def why_unreadable(self, name: str) -> str | None:
        """As the model's."""
        return self._base.why_unreadable(name)

    def is_quantized(self, name: str) -> bool:
        """As the model's; what is changed never is."""
        return self._base.is_quantized(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, cast to `dtype`; None: as it is stored, and float32 where it is changed.

        Raises:
            CheckpointError: it, or what the adapter has for it, cannot be read or is not finite.
        """
        replacement, update = self._replacements.get(name), self._updates.get(name)
        if replacement is None and update is None:
            return self._base.read(name, dtype)
        exact = self._base.read(name, torch.float32) if replacement is None else self._adapter.read(replacement)
        if update is not None:
            exact = exact + self._adapter.delta(update)
        rounded = exact.to(dtype or torch.float32)
        if not bool(torch.isfinite(rounded).all()):
            raise CheckpointError(
                f"{name} of {self.folder} with what {self._adapter.folder} adds holds NaN or infinite values as "
                f"{short_name(rounded.dtype)}: the adapter is damaged, or its values need a wider dtype."
            )
        return rounded

    def quantized(self, name: str) -> QuantizedWeight | None:
        """As the model's; None where it is changed."""
        changed = name in self._updates or name in self._replacements
        return None if changed else self._base.quantized(name)

    def reopened(self) -> MergedTensors:
        """The same, of the files that have these names now."""
        return MergedTensors(self._base.reopened(), Adapter(self._adapter.folder), tied=self._tied)

    def _by_source(self, changes: Mapping[str, T], published: Mapping[str, str]) -> dict[str, T]:
        """What an adapter changes, by the names in the model's files."""
        meant = {known_as: name for name, known_as in text_model_names(changes).items()}
        found: dict[str, T] = {}
        for known_as, change in changes.items():
            name = meant.get(known_as, known_as)
            if name not in published:
                raise CheckpointError(
                    f"{self._adapter.folder} changes {known_as}, which {self.folder} does not have: the adapter "
                    "belongs to another model."
                )
            if self._tied and name in _TIED:
                raise CheckpointError(
                    f"{self._adapter.folder} changes {known_as}, which is output head and embedding at once in "
                    f"{self.folder}: merge it with peft, which can part them, and run the result."
                )
            found[published[name]] = change
        return found

    def _require_fits(self, source: str, shape: tuple[int, ...], what: str) -> None:
        if self._base.is_quantized(source):
            raise CheckpointError(
                f"{source} is stored as {self._base.shown_dtype(source)} in {self.folder}, and an adapter is merged "
                "into weights that are not quantised: name the original release, which --weights int4 quantises as it "
                "is read."
            )
        if shape != self._base.shape(source):
            raise CheckpointError(
                f"{self._adapter.folder}: {what} has the shape {list(shape)}, and {source} of {self.folder} has "
                f"{list(self._base.shape(source))}: the adapter belongs to another model."
            )
