"""What a conversion did, as it is printed and kept beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from latentkv.convert.options import Export
from latentkv.models.config import ModelConfig
from latentkv.ops.kv_formats import KVFormat
from latentkv.saved_values import as_saved
from latentkv.state import bytes_per_token


@dataclass(frozen=True)
class LayerRow:
    """A layer of the report.

    Attributes:
        layer: its number.
        balance: chosen.
        output_error: |converted - source|^2 / |source|^2 of the attention's output, on held-out calibration text.
        rope_energy: share of the keys' energy that keeps its RoPE.
        kept_energy: share of the weighted energy that the factors keep.
        stream_error: |converted - source|^2 / |source|^2 of the residual stream after the layer, mean over tokens of
            the same text: what this layer and those before it lost.
        norm_variation: of norms on queries and keys, which are folded in at their mean; 0 without such norms.
    """

    layer: int
    balance: float
    output_error: float
    rope_energy: float
    kept_energy: float
    stream_error: float
    norm_variation: float


@dataclass(frozen=True)
class CacheBytes:
    """What a token takes in the cache, all layers, padding included.

    Attributes:
        dtype: that the cache stores: the checkpoint's.
        before, after: of the source and of the converted model.
    """

    dtype: KVFormat
    before: int
    after: int

    @classmethod
    def of(cls, source: ModelConfig, converted: ModelConfig, dtype: KVFormat) -> CacheBytes:
        """Counted by the cache's own formula."""
        before, after = (bytes_per_token(each.specs(dtype)) for each in (source, converted))
        return cls(dtype, before, after)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        rank, rope_dim: of the converted model.
        cached_before, cached_after: numbers a token and layer.
        cache: the same in bytes, all layers.
        calibration_tokens: that were read.
        forecasts: (rank, rope_dim, mean error of the layers' outputs) of all sizes that were considered.
        frequencies: [R / 2] of the shared key.
        layers: one row each.
        export: the engine that it is for, besides LatentKV.
        read_by: the engines that read it as it is meant.
    """

    rank: int
    rope_dim: int
    cached_before: int
    cached_after: int
    cache: CacheBytes
    calibration_tokens: int
    forecasts: tuple[tuple[int, int, float], ...]
    frequencies: tuple[float, ...]
    layers: tuple[LayerRow, ...]
    export: Export
    read_by: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For REPORT_FILE."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ConversionReport:
        """What `as_json` gave; a `ValueError` or `KeyError` names what it cannot be."""
        report = as_saved(cls, {name: content[name] for name in cls.__dataclass_fields__})
        if not report.layers:
            raise ValueError("it has no layers")
        return report
