"""Weights as AWQ's tools store them (AutoAWQ's layout "gemm").

`NAME.weight` [O, D] is `NAME.qweight` [D, O / 8] int32 (8 codes of 4 bits along the outputs, in the order 0, 2, 4, 6,
1, 3, 5, 7 from the lowest bits up), `NAME.qzeros` [groups, O / 8] int32 (zero points, likewise) and `NAME.scales`
[groups, O] float16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.files.stored_weight import (
    Read,
    ShapeOf,
    affine,
    read_group,
    require_parts,
    require_shapes,
    require_words,
)
from latentkv.weights.weight import QuantizedWeight

METHOD = "awq"
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = [_ORDER.index(output) for output in range(8)]  # where each output's code is


@dataclass(frozen=True)
class AWQWeight:
    """See `StoredWeight`.

    Attributes:
        module: whose weight it is.
        group: inputs that share a scale; None: all.
    """

    module: str
    group: int | None

    @property
    def rounded(self) -> bool:
        """See `StoredWeight`."""
        return True

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight`."""
        return tuple(f"{self.module}.{name}" for name in ("qweight", "qzeros", "scales"))

    @property
    def shown(self) -> str:
        """See `StoredWeight`."""
        return "AWQ int4"

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """See `StoredWeight`."""
        codes, zeros, scales = (shape_of(part) for part in self.parts)
        if len(codes) != 2 or 0 in codes:
            raise CheckpointError(f"{self.parts[0]} has the shape {list(codes)}: only matrices are supported")
        inputs, outputs = codes[0], codes[1] * 8
        groups = -(-inputs // (self.group or inputs))
        _, qzeros, scale_part = self.parts
        require_shapes({qzeros: zeros, scale_part: scales}, {qzeros: (groups, codes[1]), scale_part: (groups, outputs)})
        return outputs, inputs

    def unpack(self, read: Read) -> QuantizedWeight:
        """See `StoredWeight`."""
        qweight, qzeros, scales = (read(part) for part in self.parts)
        found = dict(zip(self.parts, (qweight, qzeros, scales), strict=True))
        _, inputs = self.shape(lambda part: tuple(found[part].shape), read)
        require_words(dict(list(found.items())[:2]))
        name = f"{self.module}.weight"
        return affine(name, _codes(qweight).T.contiguous(), _codes(qzeros).T, scales.T, 4, self.group or inputs)


def find_awq(names: Collection[str], config: Mapping[str, Any]) -> dict[str, AWQWeight]:
    """Every weight that AWQ's tools have stored, by its name.

    Raises:
        CheckpointError: the config is not supported, or a weight lacks a part.
    """
    bits, version, group = config.get("bits", 4), config.get("version", "gemm"), read_group(config)
    if bits != 4 or type(bits) is not int:
        raise CheckpointError(f"quantization_config.bits is {bits!r:.40}: of AWQ's only 4 is supported")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(
            f"quantization_config.version is {version!r:.40}: of AWQ's layouts only gemm is supported"
        )
    found: dict[str, AWQWeight] = {}
    for name in names:
        module = name.removesuffix(".qweight")
        if module != name:
            found[f"{module}.weight"] = weight = AWQWeight(module, group)
            require_parts(weight.parts, names)
    return found


def _codes(words: Tensor) -> Tensor:
    """[rows, words] int32 to [rows, 8 words] in the order of the outputs; int16."""
    data = words.contiguous().view(torch.uint8)
    nibbles = torch.stack([data & 15, data >> 4], dim=-1).flatten(1).unflatten(1, (-1, 8))
    return nibbles[..., _PLACES].flatten(1).to(torch.int16)
