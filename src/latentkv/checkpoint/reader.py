"""`CheckpointReader`: a folder of safetensors, read tensor by tensor, every header checked before the first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from latentkv.checkpoint.layouts import ORIGINAL, foreign_quantization
from latentkv.checkpoint.locate import CONFIG_FILE, INDEX_FILE, locate_tensors, open_file, read_object
from latentkv.checkpoint.quantization import activations_of, quantization_method, quantization_of
from latentkv.checkpoint.wrapper import config_levels
from latentkv.errors import CheckpointError
from latentkv.libraries import errors_as
from latentkv.weights.files import awq, compressed_config, gptq, modelopt
from latentkv.weights.files.compressed_tensors import CompressedWeight, find_compressed
from latentkv.weights.files.deepseek_fp8 import SCALE_SUFFIXES, Float8Scheme, find_float8, read_float8_scheme
from latentkv.weights.files.dtypes import STORED, StoredDtype, short_name
from latentkv.weights.files.stored_weight import Headers, StoredWeight
from latentkv.weights.policy import WeightScheme
from latentkv.weights.weight import QuantizedWeight

# A file's pages stay in this process's memory as long as it is mapped: it is opened anew after this many bytes.
_MAX_MAPPED_BYTES = 256 * 2**20

# Of a KV cache in low precision; this one has scales of its own.
_CACHE_SCALES = (".k_scale", ".v_scale")

# By the method that a config names: what finds the weights that are stored quantised.
_FINDERS: Mapping[str, Callable[[Headers, Mapping[str, Any]], Mapping[str, StoredWeight]]] = {
    compressed_config.METHOD: find_compressed,
    gptq.METHOD: gptq.find_gptq,
    awq.METHOD: awq.find_awq,
    modelopt.METHOD: modelopt.find_modelopt,
}


class CheckpointReader:
    """The tensors of a checkpoint folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Float8 weights with a `<name>_scale_inv` beside them (DeepSeek-V3, arXiv 2412.19437, section 3.3) are dequantised as
    they are read, and so are those of compressed-tensors, ModelOpt, GPTQ and AWQ, unless they are asked for as they
    are; what belongs to a weight is not listed as a tensor of its own. Memory in use is about that of one tensor.

    Args:
        folder: the checkpoint; its `config.json`, where present, says how weights are quantised.

    Attributes:
        nests_text_model: its config.json describes the text model inside a larger one.

    Raises:
        CheckpointError: there are no safetensors, a file is damaged, the index disagrees with its shards, or weights
            are quantised in a way that is not supported.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of = locate_tensors(self.folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for shard in sorted(set(self._shard_of.values())):
            self._read_header(shard)
        whole = read_object(self.folder / CONFIG_FILE) if (self.folder / CONFIG_FILE).is_file() else {}
        self.nests_text_model = len(config_levels(whole)) > 1
        self._quantization = config = quantization_of(self.folder, whole)
        _refuse_foreign(config)
        find = _FINDERS.get(quantization_method(config) or "")
        self._float8 = Float8Scheme() if find else read_float8_scheme(config)
        self._packed: Mapping[str, StoredWeight] = (
            find(self._headers, config) if find and config else find_float8(self._headers, self._float8)
        )
        self._parts = {part for weight in self._packed.values() for part in weight.parts}
        twice = (name for name, weight in self._packed.items() if name in self._headers and name not in weight.parts)
        if stored_twice := sorted(twice):
            raise CheckpointError(f"{stored_twice[0]} is stored twice, packed and unpacked: remove one of the two")
        self._file_of = {name: shard for name, shard in self._shard_of.items() if not self._belongs_to_weight(name)}
        self._file_of |= {name: self._shard_of[weight.parts[0]] for name, weight in self._packed.items()}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of packed weights
        self._open_shard = ""
        self._handle: Any = None
        self._mapped_bytes = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, shard by shard: reading in this order opens each shard once."""
        return tuple(sorted(self._file_of, key=lambda name: (self._file_of[name], name)))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return tuple(self.folder / shard for shard in sorted(set(self._shard_of.values())))

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the files is not honoured, a sentence each."""
        asked = activations_of(self._quantization)
        if asked is None:
            return ()
        return (f"its config quantises activations, too ({asked}): here they are computed as they are",)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header (of a packed weight: from the tensor that says it)."""
        self._require(name)
        if name in self._packed and name not in self._shapes:
            self._shapes[name] = self._packed[name].shape(lambda part: self._headers[part][0], self._load)
        return self._shapes[name] if name in self._packed else self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in; of quantised weights but float8 bfloat16, in which models run."""
        self._require(name)
        if name in self._packed and (name not in self._headers or not self._stored(name).is_float8):
            return torch.bfloat16
        stored = self._stored(name)
        if stored.torch is None:
            raise CheckpointError(f"tensor {name} is stored as {stored.name}, which is not supported: {ORIGINAL}")
        return stored.torch

    def shown_dtype(self, name: str) -> str:
        """How a tensor is stored, for people; every dtype that a file may name has one."""
        self._require(name)
        return self._packed[name].shown if name in self._packed else self._stored(name).shown

    def why_unreadable(self, name: str) -> str | None:
        """Why `read` cannot give a tensor's weights, from the headers alone; None where it can.

        Floating point is read as it is, float8 only with scales beside it. Anything else is no weight.
        """
        self._require(name)
        if name in self._packed:
            return None
        stored, shape, scale = self._stored(name), self._headers[name][0], f"{name}_scale_inv"
        if stored.is_float:
            return None
        if not stored.is_float8:
            return f"{name} (expected floating point, found {stored.shown})"
        if scale not in self._headers:
            return f"float8 tensor {name} has no {scale} beside it: only float8 with DeepSeek's scales is supported"
        if not self._float8.fits(shape, self._headers[scale][0]):
            return (
                f"scale {scale} of shape {list(self._headers[scale][0])} does not fit {name}, which needs "
                f"{list(self._float8.grid(shape))}"
            )
        return self._float8.why_no_scale(scale, self._stored(scale))

    def scheme(self, name: str) -> WeightScheme | None:
        """How a weight of the compressed-tensors format is packed; None for every other tensor."""
        self._require(name)
        weight = self._packed.get(name)
        return weight.scheme if isinstance(weight, CompressedWeight) else None

    def is_quantized(self, name: str) -> bool:
        """Whether a tool made a weight of a published one."""
        self._require(name)
        return name in self._packed and self._packed[name].rounded

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files, scales that belong to it included."""
        self._require(name)
        unkept = (name, *(scale for scale in (f"{name}_scale_inv",) if scale in self._headers))
        parts = self._packed[name].parts if name in self._packed else unkept
        return sum(self._stored(part).nbytes(self._headers[part][0]) for part in parts)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: one of `names`.
            dtype: what to cast it to; None keeps the stored dtype (float32 for a dequantised weight).

        Raises:
            CheckpointError: no such tensor, its file cannot be read, or a value is NaN or infinite.
        """
        stored_dtype = self.dtype(name)
        weight = self.quantized(name)
        if weight is not None:
            tensor = weight.dequantize(dtype or torch.float32)
        elif self._stored(name).is_float8:
            if reason := self.why_unreadable(name):
                raise CheckpointError(reason)
            tensor = self._float8.dequantize(self._load(name), self._load(f"{name}_scale_inv"), dtype or torch.float32)
        else:
            tensor = self._load(name).to(dtype or stored_dtype)
        if not _is_finite(tensor):
            raise CheckpointError(
                f"tensor {name} holds NaN or infinite values as {short_name(tensor.dtype)}: "
                "the checkpoint is damaged, or its values need a wider dtype"
            )
        return tensor

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A weight's codes and scales as they are stored; None where it is stored in another way.

        Raises:
            CheckpointError: no such tensor, its file cannot be read, or its parts do not fit together.
        """
        self._require(name)
        return self._packed[name].unpack(self._load) if name in self._packed else None

    def reopened(self) -> CheckpointReader:
        """The same folder, as it is now."""
        return CheckpointReader(self.folder)

    def _load(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if shard != self._open_shard or self._mapped_bytes > _MAX_MAPPED_BYTES:
            self._handle = None  # unmaps the previous file before the next is mapped
            self._handle = open_file(self.folder / shard)
            self._open_shard, self._mapped_bytes = shard, 0
        with errors_as(CheckpointError, f"tensor {name} of {self.folder / shard} cannot be read"):
            tensor = cast(Tensor, self._handle.get_tensor(name))
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _read_header(self, shard: str) -> None:
        handle = open_file(self.folder / shard)
        found = set(handle.keys())
        expected = {name for name, where in self._shard_of.items() if where == shard}
        if missing := sorted(expected - found):
            raise CheckpointError(
                f"{INDEX_FILE} places tensor {missing[0]} in {shard}, which lacks it ({len(missing)} such): "
                f"download {shard} and the index again"
            )
        for name in expected:
            view = handle.get_slice(name)
            self._headers[name] = (tuple(view.get_shape()), str(view.get_dtype()))

    def _require(self, name: str) -> None:
        if name not in self:
            raise CheckpointError(f"{self.folder} has no tensor {name}: see CheckpointReader.names for what it has")

    def _stored(self, name: str) -> StoredDtype:
        stored = self._headers[name][1]
        if stored not in STORED:
            raise CheckpointError(f"tensor {name} is stored as {stored}, which is not known: convert it to bf16")
        return STORED[stored]

    def _belongs_to_weight(self, name: str) -> bool:
        """Whether a stored tensor is a scale or another part of a quantised weight."""
        if name in self._parts or (self._quantization and name.endswith(_CACHE_SCALES)):
            return True
        for suffix in SCALE_SUFFIXES:
            base = name.removesuffix(suffix)
            if base == name:
                continue
            # Scales of x.weight: x.weight_scale_inv and x.activation_scale; of fused experts y: y_activation_scale.
            weights = (base, f"{base}.weight")
            if any(self._headers.get(weight, ((), ""))[1].startswith("F8") for weight in weights):
                return True
        return False


def _refuse_foreign(quantization: Mapping[str, Any] | None) -> None:
    if quantization and (method := foreign_quantization(quantization)):
        raise CheckpointError(f"the checkpoint's weights are quantised by {method}, which is not supported: {ORIGINAL}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)  # one pass without a temporary; NaN comes through
    return bool(torch.isfinite(low) and torch.isfinite(high))
