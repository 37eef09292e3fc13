"""What a weight is: in files, as integers with scales, and in the order in which kernels read it."""

from latentkv.weights.layout import PackedFormat, PackedWeight, pack_weight
from latentkv.weights.weight import QuantizedWeight, WeightFormat, quantize_weight

__all__ = [
    "PackedFormat",
    "PackedWeight",
    "QuantizedWeight",
    "WeightFormat",
    "pack_weight",
    "quantize_weight",
]
