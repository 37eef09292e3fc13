"""What a weight is: in files, as integers with scales, and in the order in which kernels read it."""

from latentkv.weights.formats import CodeFormat
from latentkv.weights.layout import PackedWeight, pack_weight
from latentkv.weights.weight import QuantizedWeight, quantize_weight

__all__ = [
    "CodeFormat",
    "PackedWeight",
    "QuantizedWeight",
    "pack_weight",
    "quantize_weight",
]
