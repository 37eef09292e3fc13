"""`GGUFTensors`: a GGUF file's tensors under the names that they were published under."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.checkpoint.gguf.config import config_of
from latentkv.checkpoint.gguf.names import sources_of
from latentkv.checkpoint.gguf.recipes import Recipe, Rows
from latentkv.checkpoint.gguf.rope import FACTOR_TENSORS
from latentkv.errors import CheckpointError
from latentkv.weights.gguf.container import open_gguf
from latentkv.weights.gguf.types import TensorType, dequantize, read_codes
from latentkv.weights.weight import QuantizedWeight

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_gguf(path: Path) -> bool:
    """Whether a model is a GGUF file, by its name."""
    return path.suffix == ".gguf" and not path.is_dir()


class GGUFTensors:
    """See `checkpoint.tensors.Tensors`; experts are read one by one, as published.

    Args:
        path: of the file, or of a part of a split one.

    Attributes:
        folder: the file.
        nests_text_model: never.
        metadata: by key, in Python's own types.

    Raises:
        CheckpointError: it is damaged, or holds a model that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self.folder = self._file.path
        self.nests_text_model = False
        self.metadata: Mapping[str, Any] = {key: _plain(value) for key, value in self._file.metadata.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json that the metadata mean."""
        factors = {name: self._numbers(name).flatten().tolist() for name in FACTOR_TENSORS if name in self._shapes}
        return config_of(self.metadata, self._shapes, factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the file's order."""
        places = {name: place for place, name in enumerate(self._file.tensors)}
        return tuple(sorted(self._recipes, key=lambda name: places[self._recipes[name].sources[0]]))

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all of its parts."""
        return self._file.files

    @property
    def notes(self) -> tuple[str, ...]:
        """Which types take more memory than the file has for them."""
        kinds = Counter(self._kind(name) for name in self.names if self.is_quantized(name))
        wide = [(kind, count) for kind, count in kinds.items() if kind.is_widened]
        if not wide:
            return ()
        listed = ", ".join(f"{kind.name} ({count} tensors) as {kind.code_bits}" for kind, count in wide)
        return (
            f"{listed} bits a weight in memory, where the file has fewer: one code of it stands for several weights",
        )

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._recipe(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in; of quantised weights bfloat16."""
        return _PLAIN.get(self._kind(name).name, torch.bfloat16)

    def shown_dtype(self, name: str) -> str:
        """The type of the file's tensor."""
        return self._kind(name).name

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        kinds = [(self._file.tensors[source].shape, self._type(source)) for source in self._recipe(name).sources]
        if len(kinds) > 1:
            return sum(math.prod(shape) // kind.weights * kind.nbytes for shape, kind in kinds)
        return math.prod(self.shape(name)) // kinds[0][1].weights * kinds[0][1].nbytes

    def why_unreadable(self, name: str) -> str | None:
        """Why `read` cannot give a tensor's weights; None where it can."""
        kinds = [self._type(source) for source in self._recipe(name).sources]
        wrong = next((kind for kind in kinds if kind.decode is None), None)
        return None if wrong is None else f"{name} (expected a type of weights, found {wrong.name})"

    def is_quantized(self, name: str) -> bool:
        """Whether `quantized` gives a weight."""
        recipe = self._recipe(name)
        return isinstance(recipe, Rows) and len(recipe.shape) > 1 and self._kind(name).coded is not None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, cast to `dtype`; None: as it is stored, float32 where it is quantised.

        Raises:
            CheckpointError: there is no such tensor, or it holds NaN or infinite values.
        """
        recipe = self._recipe(name)
        if isinstance(recipe, Rows):
            kind, raw = self._kind(name), self._file.read(recipe.source)
            if len(recipe.shape) == 1:
                numbers = recipe.take(dequantize(raw, kind).flatten())
            else:
                rows = recipe.take(raw.view(*self._file.tensors[recipe.source].shape[:-1], -1))
                numbers = dequantize(rows.flatten(0, -2), kind).view(recipe.shape)
        else:
            numbers = recipe.join(self._numbers(recipe.key), self._numbers(recipe.value))
        plain = _PLAIN.get(self._kind(name).name, torch.float32)
        tensor = numbers.to(dtype or plain)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor {name} of {self.folder} holds NaN or infinite values: the file is damaged, or its values need "
                "a wider dtype"
            )
        return tensor

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A matrix' integers and scales; None where it is stored in another way.

        Raises:
            CheckpointError: there is no such tensor, or its scales are NaN or infinite.
        """
        recipe, kind = self._recipe(name), self._kind(name)
        if not isinstance(recipe, Rows) or len(recipe.shape) == 1 or kind.coded is None:
            return None
        raw = self._file.read(recipe.source).view(*self._file.tensors[recipe.source].shape[:-1], -1)
        rows = recipe.take(raw).flatten(0, -2)
        weight = read_codes(rows.reshape(-1, kind.nbytes), kind).as_weight(len(rows))
        shared = [weight.scales] if weight.minima is None else [weight.scales, weight.minima]
        if not all(bool(torch.isfinite(numbers).all()) for numbers in shared):
            raise CheckpointError(f"tensor {name} of {self.folder} has NaN or infinite scales: download it again")
        return weight

    def reopened(self) -> GGUFTensors:
        """The same file, as it is now."""
        return GGUFTensors(self.folder)

    @cached_property
    def _recipes(self) -> Mapping[str, Recipe]:
        return sources_of(self.config, self._shapes)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(info.shape) for name, info in self._file.tensors.items()}

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            raise CheckpointError(f"{self.folder} has no tensor {name}: see GGUFTensors.names for what it has")
        return self._recipes[name]

    def _kind(self, name: str) -> TensorType:
        return self._type(self._recipe(name).sources[0])

    def _type(self, source: str) -> TensorType:
        return self._file.tensors[source].type

    def _numbers(self, source: str) -> Tensor:
        info = self._file.tensors[source]
        return dequantize(self._file.read(source), self._type(source)).view(info.shape)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
