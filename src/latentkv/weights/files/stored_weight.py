"""`StoredWeight`: how files hold one quantised weight, whatever tool wrote them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from latentkv.errors import CheckpointError
from latentkv.weights.formats import of_integers
from latentkv.weights.weight import QuantizedWeight

Read = Callable[[str], Tensor]
"""Gives a stored tensor by its name."""

ShapeOf = Callable[[str], tuple[int, ...]]
"""Gives a stored tensor's shape by its name, from its file's header."""


Headers = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of every stored tensor, the dtype as safetensors calls it."""

# What low-precision arithmetic needs beside a module's weight; here activations are computed as they are.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


class StoredWeight(Protocol):
    """One weight [O, D] in several stored tensors."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors; it lies where the first one does."""
        ...

    @property
    def shown(self) -> str:
        """How it is stored, for people."""
        ...

    @property
    def rounded(self) -> bool:
        """Whether a tool made it of a published weight."""
        ...

    def shape(self, shape_of: ShapeOf, read: Read) -> tuple[int, ...]:
        """Of the weight.

        Raises:
            CheckpointError: the parts' shapes do not fit together.
        """
        ...

    def unpack(self, read: Read) -> QuantizedWeight:
        """The weight that the parts stand for, exactly.

        Raises:
            CheckpointError: they do not fit together, or hold what no weight has.
        """
        ...


def affine(name: str, codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, group: int) -> QuantizedWeight:
    """The weight scale * (code - zero), exactly.

    Where all zeros are the middle code, as symmetric tools write them, nothing is added to the scaled codes. Else what
    is added is a product of a float16 and a small integer, which float32 has all bits of.

    Args:
        name: of the weight, for errors.
        codes: [O, D] from 0 on.
        zeros: [O, groups] integers.
        scales: [O, groups] of any float dtype.
        bits: of a code: 4, or 8 with all zeros in the middle.
        group: inputs that share a scale.

    Raises:
        CheckpointError: scales are NaN, infinite or no floats, or codes of 8 bits have another zero.
    """
    if not scales.is_floating_point() or not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"the scales of {name} hold NaN or infinite values, or no floating point: download again")
    middle = 1 << bits - 1
    if bool((zeros == middle).all()):
        kept = scales if scales.dtype in (torch.float16, torch.bfloat16) else scales.float()
        return QuantizedWeight(
            (codes - middle).to(torch.int8), kept.contiguous(), of_integers(bits, minima=False), group
        )
    if bits == 8:
        raise CheckpointError(
            f"{name} is quantised to 8 bits with zero points, which is not supported: quantise the original weights "
            "with `latentkv quantize`"
        )
    exact = scales.float()
    form = of_integers(bits, minima=True)
    return QuantizedWeight(codes.to(torch.int8), exact.contiguous(), form, group, -(exact * zeros))


def activation_parts(headers: Collection[str], module: str) -> tuple[str, ...]:
    """Names of a module's tensors that serve arithmetic with quantised activations."""
    return tuple(name for part in _OF_ACTIVATIONS if (name := f"{module}.{part}") in headers)


def require_parts(parts: Collection[str], names: Collection[str]) -> None:
    """Raise `CheckpointError` unless all parts of a weight are there."""
    for part in parts:
        if part not in names:
            raise CheckpointError(
                f"the checkpoint has no {part}, which belongs to a quantised weight: download it again"
            )


def require_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless the parts of a weight have the shapes that its first one asks for."""
    for part, shape in expected.items():
        if found[part] != shape:
            raise CheckpointError(
                f"{part} has the shape {list(found[part])} and should have {list(shape)}: the checkpoint is damaged, "
                "or its config.json belongs to another"
            )


def require_words(parts: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless parts with several numbers in a word are int32."""
    for part, tensor in parts.items():
        if tensor.dtype != torch.int32:
            raise CheckpointError(f"{part} is stored as {tensor.dtype}: it must be int32")


def read_group(config: Mapping[str, Any]) -> int | None:
    """The inputs that share a scale, from a config's `group_size`; None: all.

    Raises:
        CheckpointError: it is no size that is supported.
    """
    group = config.get("group_size", 128)
    if type(group) is not int or not (group == -1 or (group > 0 and group % 8 == 0)):
        raise CheckpointError(
            f"quantization_config.group_size is {group!r:.40}: it must be a multiple of 8, or -1 for whole rows"
        )
    return None if group == -1 else group
