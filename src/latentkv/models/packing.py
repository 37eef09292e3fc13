"""Packing a decoder: its weights laid out, and if asked quantised, for the native kernels. It cannot be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latentkv.checkpoint.names import published_name
from latentkv.errors import ConfigError
from latentkv.ops.backends import compact_is_fast, why_not_native
from latentkv.weights import PackedWeight, QuantizedWeight, pack_weight, quantize_weight
from latentkv.weights.formats import ROUNDED_TO, CodeFormat
from latentkv.weights.policy import choose_scheme

Weight = Tensor | QuantizedWeight

EXACT = "exact"
ACTIVATIONS = (EXACT, "int8")
"""What may be said of activations."""

_NO_QUANTISED_WEIGHTS = (
    "activations='int8' are multiplied by quantised weights, and this model would run without any: "
    "add weights='int8' or weights='int4', or leave it out."
)


@dataclass(frozen=True)
class Packing:
    """How weights are to be stored.

    Attributes:
        format: what the large matrices are rounded to, as `weights/policy.py` tells; None: they stay as they are.
        group: weights that share a scale; None: the format's default.
        compact: keep what stays bfloat16 in 12 bits, without loss (`weights/compact.py`).
        rounds_input: activations are rounded to 8 bits where they meet quantised weights (`weights/activations.py`).
    """

    format: CodeFormat | None = None
    group: int | None = None
    compact: bool = False
    rounds_input: bool = False


@runtime_checkable
class Packable(Protocol):
    """A module with weights to pack. A parent is packed before its children, and may take their weights."""

    def pack(self, packer: Packer) -> None:
        """Replace weights by packed ones."""
        ...


@dataclass(frozen=True)
class Packer:
    """Packs the weights of one module.

    Attributes:
        packing: how.
        module: whose weights.
        prefix: the module's name in the decoder, with a dot at its end (empty for the decoder itself).
        quantized: weights that the checkpoint holds quantised, by their names in the decoder.
    """

    packing: Packing
    module: nn.Module
    prefix: str
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    def __call__(self, *names: str) -> PackedWeight:
        """The weights `names` of this module or its children, their rows joined in this order; they are dropped."""
        shapes = [self.module.get_parameter(name).shape for name in names]
        rows = sum(shape[-2] for shape in shapes)
        packed = self._made(
            "+".join(names),
            (*shapes[0][:-2], rows, shapes[0][-1]),
            lambda: join_rows([self._stored(name) for name in names]),
        )
        for name in names:
            parent, _, leaf = name.rpartition(".")
            self.module.get_submodule(parent).register_parameter(leaf, None)
        return packed

    def copy(self, name: str, *, as_name: str) -> PackedWeight:
        """The weight `name`, packed as the checkpoint has it or in the format of `as_name`; the module keeps it."""
        weight = self.module.get_parameter(name).detach()
        quantized = self.quantized.get(self.prefix + name)
        return self._made(as_name, weight.shape, lambda: quantized or self._in_format(weight, as_name))

    def pack(self, name: str, weight: Tensor) -> PackedWeight:
        """A weight that a module made of others, packed as it is; `name` is its own in the module."""
        return self._made(name, weight.shape, weight.contiguous)

    def made(self, name: str, shape: Sequence[int], weight: Callable[[], Weight]) -> PackedWeight:
        """What `weight` gives, packed; all of a module's packed weights come from here, whatever they round.

        Args:
            name: of the packed weight in the module, one that no other has.
            shape: [O, D] or [E, O, D].
            weight: called here at most, once.
        """
        return pack_weight(weight(), compact=self.packing.compact)

    def plain(self, name: str) -> Tensor:
        """The weight `name` as a tensor; the module keeps it."""
        quantized = self.quantized.get(self.prefix + name)
        return self.module.get_parameter(name).detach() if quantized is None else quantized.dequantize()

    def quantises(self, name: str) -> bool:
        """Whether the weight `name` is quantised, by the checkpoint or by what is asked for."""
        return self.packing.format is not None or self.prefix + name in self.quantized

    def _made(self, name: str, shape: Sequence[int], weight: Callable[[], Weight]) -> PackedWeight:
        packed = self.made(name, shape, weight)
        return packed.rounding_input() if self.packing.rounds_input else packed

    def _stored(self, name: str) -> Weight:
        full = self.prefix + name
        if full in self.quantized:
            return self.quantized[full]
        return self._in_format(self.module.get_parameter(name).detach(), full)

    def _in_format(self, weight: Tensor, name: str) -> Weight:
        if self.packing.format is None:
            return weight
        # The number of the layer does not matter, so those of the model need not be counted.
        published = published_name(name, num_layers=0)
        scheme = choose_scheme(published, weight.shape, self.packing.format, self.packing.group)
        return weight if scheme is None else quantize_weight(weight, scheme.format, scheme.group)


PackerOf = Callable[[Packing, nn.Module, str, Mapping[str, QuantizedWeight]], Packer]
"""What gives the packer of a module: `Packer` itself, or another that is made as it is."""


def choose_packing(
    weights: str | None, dtype: torch.dtype, device: torch.device, activations: str = EXACT
) -> Packing | None:
    """How to pack a model whose hidden states have `dtype` on `device`; None: not at all, torch computes.

    Packing bf16 changes no weight, so it is done wherever the native kernels run. The kernels take activations in bf16
    and float32; a float32 model is packed only if its weights are to be quantised.

    Args:
        weights: name of a format to round to, or None (as the checkpoint stores them).
        dtype: of the hidden states.
        device: where the model runs.
        activations: "int8" rounds them to 8 bits where they meet quantised weights; "exact" takes them as they are.

    Raises:
        ConfigError: quantised weights or int8 activations are asked for, but cannot be had here.
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations={activations!r} is not supported: choose {' or '.join(ACTIVATIONS)}.")
    rounds_input, why_not = activations != EXACT, why_not_native(device)
    if rounds_input and why_not is not None:
        raise ConfigError(f"activations={activations!r} needs the native kernels, which {why_not}.")
    if weights is not None and weights not in ROUNDED_TO:
        raise ConfigError(f"weights={weights!r} is not supported: choose {' or '.join(ROUNDED_TO)}.")
    if weights is None and why_not is None and dtype == torch.bfloat16:
        return Packing(compact=compact_is_fast(), rounds_input=rounds_input)
    if weights is None:
        if rounds_input:
            raise ConfigError(_NO_QUANTISED_WEIGHTS)
        return None
    if why_not is not None:
        raise ConfigError(f"weights={weights!r} needs the native kernels, which {why_not}.")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"weights={weights!r} runs with dtype bf16 or fp32, not {str(dtype).removeprefix('torch.')}.")
    return Packing(ROUNDED_TO[weights], compact=compact_is_fast(), rounds_input=rounds_input)


def packed_weights(module: nn.Module) -> Iterator[PackedWeight]:
    """All packed weights in a module."""
    for each in module.modules():
        yield from (value for value in vars(each).values() if isinstance(value, PackedWeight))


def require_rounded_input(module: nn.Module) -> None:
    """Raise `ConfigError` where no packed weight in `module` rounds its input: to ask for that would be in vain."""
    if not any(weight.rounds_input for weight in packed_weights(module)):
        raise ConfigError(_NO_QUANTISED_WEIGHTS)


def pack_module(
    module: nn.Module,
    packing: Packing,
    *,
    prefix: str = "",
    quantized: Mapping[str, QuantizedWeight] | None = None,
    packer_of: PackerOf = Packer,
) -> None:
    """Pack a module and all that is in it.

    Args:
        module: a decoder or a part of one, on the CPU.
        packing: how.
        prefix: the module's name in the decoder.
        quantized: weights that the checkpoint holds quantised, by their names in the decoder; the module's own
            parameters of these names hold nothing.
        packer_of: what packs each module in it.
    """
    _pack(module, packing, f"{prefix}." if prefix else "", quantized or {}, packer_of)


def takes_packed(module: nn.Module) -> Callable[[str], bool]:
    """Which of the parameters in a module are packed with it, by their names; the others must hold numbers."""
    packed = tuple(f"{name}." if name else "" for name, child in module.named_modules() if isinstance(child, Packable))
    return lambda name: name.startswith(packed)


def _pack(
    module: nn.Module, packing: Packing, prefix: str, quantized: Mapping[str, QuantizedWeight], packer_of: PackerOf
) -> None:
    if isinstance(module, Packable):
        module.pack(packer_of(packing, module, prefix, quantized))
    for name, child in list(module.named_children()):  # those that the parent has left
        _pack(child, packing, f"{prefix}{name}.", quantized, packer_of)


def join_rows(weights: list[Weight]) -> Weight:
    """Matrices [..., O, D] of one width stacked by their rows; dequantised where they are of several kinds."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, QuantizedWeight):
        alike = [weight for weight in weights if isinstance(weight, QuantizedWeight) and weight.is_like(first)]
        if len(alike) == len(weights):
            minima = [weight.minima for weight in alike if weight.minima is not None]
            return replace(
                first,
                codes=torch.cat([weight.codes for weight in alike], dim=-2),
                scales=torch.cat([weight.scales for weight in alike], dim=-2),
                minima=torch.cat(minima, dim=-2) if minima else None,
            )
    plain = [weight.dequantize() if isinstance(weight, QuantizedWeight) else weight for weight in weights]
    return torch.cat([weight.to(plain[0].dtype) for weight in plain], dim=-2)
