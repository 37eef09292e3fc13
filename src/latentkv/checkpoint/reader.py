"""`CheckpointReader`: a folder of safetensors, read tensor by tensor, every header checked before the first read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentkv.checkpoint.compressed import METHOD, PackedSchemes
from latentkv.checkpoint.fp8 import SCALE_SUFFIXES, block_size_of, dequantize_blocks
from latentkv.checkpoint.quantized import PACKED, REFUSED_PARTS, SCALE, SHAPE, unpack
from latentkv.checkpoint.schemes import WeightScheme
from latentkv.errors import CheckpointError
from latentkv.json_files import INDEX_BYTES, read_json
from latentkv.ops.weight_formats import QuantizedWeight

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A file's pages stay in this process's memory as long as it is mapped: it is opened anew after this many bytes.
_MAX_MAPPED_BYTES = 256 * 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointReader:
    """The tensors of a checkpoint folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Float8 weights with a `<name>_scale_inv` beside them (DeepSeek-V3, arXiv 2412.19437, section 3.3) are dequantised as
    they are read, and so are int8 and int4 weights of the compressed-tensors format (`checkpoint.quantized`), unless
    they are asked for as they are; what belongs to a weight is not listed as a tensor of its own. Memory in use is
    about that of one tensor.

    Args:
        folder: the checkpoint; its `config.json`, where present, says how weights are quantised.

    Raises:
        CheckpointError: there are no safetensors, a file is damaged, the index disagrees with its shards, or weights
            are quantised in a way that is not supported.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of = _locate_tensors(self.folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for shard in sorted(set(self._shard_of.values())):
            self._read_header(shard)
        config = _quantization_config(self.folder)
        is_packed = bool(config) and config.get("quant_method") == METHOD
        self._packed = _packed_weights(self._headers, config) if config and is_packed else {}
        self._block_size = None if is_packed else block_size_of(config)
        self._file_of = {name: shard for name, shard in self._shard_of.items() if not self._belongs_to_weight(name)}
        self._file_of |= {name: self._shard_of[name + PACKED] for name in self._packed}
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

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header (of a packed weight: from the tensor that says it)."""
        self._require(name)
        if name in self._packed and name not in self._headers:
            self._headers[name] = (tuple(self._load(name + SHAPE).tolist()), "BF16")
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that a tensor is stored in; of a packed weight bfloat16, that of its scales."""
        self._require(name)
        return torch.bfloat16 if name in self._packed else self._stored_dtype(name)

    def scheme(self, name: str) -> WeightScheme | None:
        """How a weight is packed as integers; None for every other tensor."""
        self._require(name)
        return self._packed.get(name)

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files, scales that belong to it included."""
        self._require(name)
        parts = [name + part for part in (PACKED, SCALE, SHAPE)] if name in self._packed else [name]
        parts += [scale for scale in (f"{name}_scale_inv",) if scale in self._headers]
        return sum(math.prod(self._headers[part][0]) * self._stored_dtype(part).itemsize for part in parts)

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
        elif stored_dtype.itemsize == 1 and stored_dtype.is_floating_point:
            tensor = self._dequantize(name, self._load(name), dtype or torch.float32)
        else:
            tensor = self._load(name).to(dtype or stored_dtype)
        if not _is_finite(tensor):
            raise CheckpointError(
                f"tensor {name} holds NaN or infinite values as {str(tensor.dtype).removeprefix('torch.')}: "
                "the checkpoint is damaged, or its values need a wider dtype"
            )
        return tensor

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A weight's integers and scales as they are stored; None where it is stored in another way.

        Raises:
            CheckpointError: no such tensor, its file cannot be read, or its parts do not fit together.
        """
        scheme = self.scheme(name)
        if scheme is None:
            return None
        return unpack(name, {part: self._load(name + part) for part in (PACKED, SCALE, SHAPE)}, scheme)

    def _dequantize(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        scale_name = f"{name}_scale_inv"
        if scale_name not in self._shard_of:
            raise CheckpointError(
                f"float8 tensor {name} has no {scale_name} beside it: only float8 with DeepSeek's scales is supported"
            )
        scale = self._load(scale_name)
        try:
            return dequantize_blocks(tensor, scale, self._block_size, dtype)
        except ValueError as error:
            raise CheckpointError(f"tensor {scale_name} does not fit {name}: {error}") from error

    def _load(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if shard != self._open_shard or self._mapped_bytes > _MAX_MAPPED_BYTES:
            self._handle = None  # unmaps the previous file before the next is mapped
            self._handle = _open(self.folder / shard)
            self._open_shard, self._mapped_bytes = shard, 0
        try:
            tensor = cast(Tensor, self._handle.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} of {self.folder / shard} cannot be read: {error}") from error
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _read_header(self, shard: str) -> None:
        handle = _open(self.folder / shard)
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

    def _stored_dtype(self, name: str) -> torch.dtype:
        stored = self._headers[name][1]
        if stored not in _DTYPES:
            raise CheckpointError(f"tensor {name} is stored as {stored}, which is not supported: convert it to bf16")
        return _DTYPES[stored]

    def _belongs_to_weight(self, name: str) -> bool:
        """Whether a stored tensor is a scale or another part of a quantised weight."""
        if any(name.endswith(part) and name.removesuffix(part) in self._packed for part in (PACKED, SCALE, SHAPE)):
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


def _locate_tensors(folder: Path) -> dict[str, str]:
    """The file of every tensor, from the index or from the one file."""
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(_open(folder / SINGLE_FILE).keys(), SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_nothing_found(folder))
    weight_map = read_json(folder / INDEX_FILE, CheckpointError, most_bytes=INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map: download it again")
    shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    for name, shard in shard_of.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} places {name} outside its folder, in {shard}: not read")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks the shard {shard} that its index names (for {name}): download it")
    return shard_of


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no checkpoint folder {folder}: name an existing one"
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return f"{folder} has {shards[0].name} but neither {SINGLE_FILE} nor {INDEX_FILE}: add the index"
    pickled = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickled:
        return f"{folder} has only pickled weights ({pickled[0].name}), which are never loaded: convert to safetensors"
    return f"{folder} has no weights: it needs {SINGLE_FILE}, or shards with {INDEX_FILE}"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}): copy or download it again"
        ) from error


def _quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """`quantization_config` of config.json, a text model's inside its wrapper included."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", CheckpointError)
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    return config.get("quantization_config") or nested


def _packed_weights(names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, WeightScheme]:
    """Every weight that is stored as packed integers, and how."""
    schemes = PackedSchemes(config)
    found: dict[str, WeightScheme] = {}
    for name in names:
        weight = name.removesuffix(PACKED)
        if weight == name:
            continue
        for part in (SCALE, SHAPE):
            if weight + part not in names:
                raise CheckpointError(f"packed weight {name} has no {weight}{part} beside it: download it again")
        for part in REFUSED_PARTS:
            if weight + part in names:
                raise CheckpointError(f"{weight}{part} says that {weight} is quantised in a way that is not supported")
        if weight in names:
            raise CheckpointError(f"{weight} is stored twice, packed and unpacked: remove one of the two")
        found[weight] = schemes.of(weight.removesuffix(".weight"))
    return found


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)  # one pass without a temporary; NaN comes through
    return bool(torch.isfinite(low) and torch.isfinite(high))
