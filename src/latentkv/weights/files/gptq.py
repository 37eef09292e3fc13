"""Weights as GPTQ's tools store them (AutoGPTQ's and GPTQModel's layout, versions 1 and 2).

`NAME.weight` [O, D] is `NAME.qweight` [D / 8, O] int32 (8 codes of 4 bits along the inputs, the first lowest; 4 of 8),
`NAME.scales` [groups, O] float16, `NAME.qzeros` [groups, O / 8] int32 (zero points along the outputs; version 1 stores
each less one) and `NAME.g_idx` [D], the group of each input.
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

METHOD = "gptq"
_VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 2}
# Keys whose presence changes what stored numbers mean, with the values that leave them alone.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "is_marlin_format": (None, False),
    "dynamic": (None, {}),
    "pack_dtype": (None, "int32"),
}


@dataclass(frozen=True)
class GPTQScheme:
    """What a config says of its weights.

    Attributes:
        bits: of a code, 4 or 8.
        group: inputs that share a scale; None: all.
        version: 1 stores zero points less one.
    """

    bits: int
    group: int | None
    version: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GPTQScheme:
        """From a config's `quantization_config`.

        Raises:
            CheckpointError: something in it is not supported.
        """
        for key, values in _OFF.items():
            if config.get(key) not in values:
                raise CheckpointError(f"quantization_config.{key} is {config[key]!r:.60}, which is not supported")
        bits, form = config.get("bits"), config.get("checkpoint_format")
        if type(bits) is not int or bits not in (4, 8):
            raise CheckpointError(f"quantization_config.bits is {bits!r:.40}: of GPTQ's only 4 and 8 are supported")
        if not isinstance(form, str | None) or form not in _VERSIONS:
            raise CheckpointError(
                f"quantization_config.checkpoint_format is {form!r:.40}, which is not supported: gptq and gptq_v2 are"
            )
        return cls(bits, read_group(config), _VERSIONS[form])


@dataclass(frozen=True)
class GPTQWeight:
    """See `StoredWeight`.

    Attributes:
        module: whose weight it is.
        scheme: of the config.
        has_order: there is a `g_idx`.
    """

    module: str
    scheme: GPTQScheme
    has_order: bool

    @property
    def rounded(self) -> bool:
        """See `StoredWeight`."""
        return True

    @property
    def parts(self) -> tuple[str, ...]:
        """See `StoredWeight`."""
        names = ["qweight", "qzeros", "scales", *(["g_idx"] if self.has_order else [])]
        return tuple(f"{self.module}.{name}" for name in names)

    @property
    def shown(self) -> str:
        """See `StoredWeight`."""
        return f"GPTQ int{self.scheme.bits}"

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """See `StoredWeight`."""
        codes, zeros, scales = (shape_of(part) for part in self.parts[:3])
        per_word = 32 // self.scheme.bits
        if len(codes) != 2 or 0 in codes:
            raise CheckpointError(f"{self.parts[0]} has the shape {list(codes)}: only matrices are supported")
        inputs, outputs = codes[0] * per_word, codes[1]
        groups = -(-inputs // (self.scheme.group or inputs))
        _, qzeros, scale_part, *_ = self.parts
        require_shapes(
            {qzeros: zeros, scale_part: scales},
            {qzeros: (groups, -(-outputs // per_word)), scale_part: (groups, outputs)},
        )
        return outputs, inputs

    def unpack(self, read: Read) -> QuantizedWeight:
        """See `StoredWeight`."""
        qweight, qzeros, scales = (read(part) for part in self.parts[:3])
        found = dict(zip(self.parts, (qweight, qzeros, scales), strict=False))
        outputs, inputs = self.shape(lambda part: tuple(found[part].shape), read)
        require_words(dict(list(found.items())[:2]))
        group = self.scheme.group or inputs
        if self.has_order:
            self._require_trivial(read(self.parts[3]), inputs, group)
        codes = _fields(qweight.T.contiguous(), self.scheme.bits)
        zeros = _fields(qzeros, self.scheme.bits)[:, :outputs].T + (1 if self.scheme.version == 1 else 0)
        return affine(f"{self.module}.weight", codes, zeros, scales.T, self.scheme.bits, group)

    def _require_trivial(self, order: Tensor, inputs: int, group: int) -> None:
        if not torch.equal(order.flatten().long(), torch.arange(inputs) // group):
            raise CheckpointError(
                f"{self.module} was quantised in another order than that of its inputs (desc_act), which is not "
                "supported: use a copy that was made without desc_act, or the original weights"
            )


def find_gptq(names: Collection[str], config: Mapping[str, Any]) -> dict[str, GPTQWeight]:
    """Every weight that GPTQ's tools have stored, by its name.

    Raises:
        CheckpointError: the config is not supported, or a weight lacks a part.
    """
    scheme = GPTQScheme.read(config)
    found: dict[str, GPTQWeight] = {}
    for name in names:
        module = name.removesuffix(".qweight")
        if module != name:
            found[f"{module}.weight"] = weight = GPTQWeight(module, scheme, f"{module}.g_idx" in names)
            require_parts(weight.parts, names)
            if config.get("desc_act") and not weight.has_order:
                raise CheckpointError(
                    f"quantization_config.desc_act says that {module} has an order of its inputs, and the checkpoint "
                    f"has no {module}.g_idx: download it again"
                )
    return found


def _fields(words: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 to [rows, numbers]: the numbers of `bits` bits in each word, the lowest first; int16."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data.to(torch.int16)
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(1).to(torch.int16)
