"""`quantization_config` of compressed-tensors: written ("pack-quantized"), read, and refused where it says more than
`WeightScheme` can (https://github.com/vllm-project/compressed-tensors)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from latentkv.errors import CheckpointError
from latentkv.weights.files.four_bit_floats import MXFP4_GROUP, NVFP4_GROUP
from latentkv.weights.files.patterns import match_patterns
from latentkv.weights.formats import FP4, FP8, INT4, INT8, CodeFormat
from latentkv.weights.policy import WeightScheme
from latentkv.weights.weight import GROUP_SIZES

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_EVERY_LINEAR, _EXPRESSION = "Linear", "re:"
# What each layout may hold: the kind of numbers, their bits, and how scales are shared.
_LAYOUTS: Mapping[str, tuple[Mapping[tuple[str, int], CodeFormat], tuple[str, ...]]] = {
    _FORMAT: ({("int", 4): INT4, ("int", 8): INT8}, ("group", "channel")),
    "int-quantized": ({("int", 8): INT8}, ("tensor", "channel", "group")),
    "float-quantized": ({("float", 8): FP8}, ("tensor", "channel", "group", "block")),
    "naive-quantized": ({("int", 8): INT8, ("float", 8): FP8}, ("tensor", "channel", "group", "block")),
    "mxfp8-quantized": ({("float", 8): FP8}, ("group",)),
    "nvfp4-pack-quantized": ({("float", 4): FP4}, ("tensor_group",)),
    "mxfp4-pack-quantized": ({("float", 4): FP4}, ("group",)),
}
# Inputs that share a scale, in layouts that have no choice of them.
_GROUPS: Mapping[str, tuple[int, ...]] = {
    "mxfp8-quantized": (32,),
    "nvfp4-pack-quantized": (NVFP4_GROUP,),
    "mxfp4-pack-quantized": (MXFP4_GROUP,),
}
# Keys whose presence changes what stored numbers mean, with the values that leave them alone.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "quantization_status": (None, "compressed"),
}
_WEIGHTS_OFF: Mapping[str, tuple[Any, ...]] = {
    "symmetric": (None, False, True),
    "dynamic": (None, False),
    "actorder": (None, False, "weight", "static"),
}


def build_config(schemes: Mapping[str, WeightScheme], kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        schemes: of each quantised module ("model.layers.0.mlp.up_proj").
        kept: linear modules that stay in high precision.
    """
    modules: dict[WeightScheme, list[str]] = {}
    for name, scheme in schemes.items():
        modules.setdefault(scheme, []).append(name)
    by_size = sorted(modules, key=lambda scheme: len(modules[scheme]), reverse=True)
    # The commonest scheme is that of all linear layers; the others name theirs, which takes precedence.
    targets = [[_EVERY_LINEAR], *(modules[scheme] for scheme in by_size[1:])]
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": named, "weights": _weights_entry(scheme)}
            | {"input_activations": None, "output_activations": None, "format": _FORMAT}
            for i, (scheme, named) in enumerate(zip(by_size, targets, strict=True))
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights_entry(scheme: WeightScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
    }


class PackedSchemes:
    """The schemes that a compressed-tensors config gives to modules.

    Args:
        config: the `quantization_config`.
        modules: names of those that will be asked about.

    Raises:
        CheckpointError: something in it is not supported, or its patterns take too long; the sentence says what.
    """

    def __init__(self, config: Mapping[str, Any], modules: Iterable[str]) -> None:
        self._by_target: dict[str, WeightScheme] = {}
        self._activations: str | None = None
        _refuse_others("quantization_config", config, _OFF)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config has no config_groups: download config.json again")
        for name, group in groups.items():
            scheme = _read_group(f"quantization_config.config_groups.{name}", group, config.get("format"))
            self._activations = self._activations or _described_activations(group)
            for target in _texts(f"quantization_config.config_groups.{name}.targets", group.get("targets")):
                self._by_target.setdefault(target, scheme)
        if not self._by_target:
            raise CheckpointError("quantization_config.config_groups name no targets: download config.json again")
        self._ignored = set(_texts("quantization_config.ignore", config.get("ignore")))
        patterns = sorted(filter(_is_pattern, self._by_target.keys() | self._ignored))
        names = list(dict.fromkeys(modules))
        expressions = [pattern.removeprefix(_EXPRESSION) for pattern in patterns]
        fits = match_patterns(expressions, names, "quantization_config")
        self._fits = {pattern: fits[pattern.removeprefix(_EXPRESSION)] for pattern in patterns}

    @property
    def activations(self) -> str | None:
        """How the config has activations quantised, for people; None: not at all."""
        return self._activations

    @property
    def asked(self) -> WeightScheme:
        """What was asked for the whole model: the narrowest format in its largest group. The others are exceptions."""
        bits = min(scheme.format.bits for scheme in self._by_target.values())
        return max((s for s in self._by_target.values() if s.format.bits == bits), key=lambda scheme: scheme.group or 0)

    def ignores(self, module: str) -> bool:
        """Whether the config says that a module stays unquantised."""
        return module in self._ignored or any(module in self._fits[it] for it in filter(_is_pattern, self._ignored))

    def of(self, module: str) -> WeightScheme:
        """The scheme of a module: the one that names it, else one whose pattern fits it, else that of all "Linear"."""
        if module in self._by_target:
            return self._by_target[module]
        for target, fits in self._fits.items():
            if target in self._by_target and module in fits:
                return self._by_target[target]
        if _EVERY_LINEAR in self._by_target:
            return self._by_target[_EVERY_LINEAR]
        raise CheckpointError(f"{module} is stored packed, but no target of quantization_config fits it")


def _described_activations(group: Mapping[str, Any]) -> str | None:
    inputs = group.get("input_activations") or group.get("output_activations")
    if not isinstance(inputs, Mapping):
        return None
    return f"{inputs.get('type', 'int')} of {inputs.get('num_bits')} bits"


def _texts(where: str, value: Any) -> list[str]:
    listed = cast("list[Any]", [] if value is None else value)
    if not isinstance(value, list | None) or not all(isinstance(text, str) for text in listed):
        raise CheckpointError(f"{where} must be a list of texts, not {value!r:.60}: download config.json again")
    return listed


def _is_pattern(target: str) -> bool:
    """Whether a target means the names that a regular expression fits, not one name."""
    return target.startswith(_EXPRESSION)


def _read_group(where: str, group: Any, common_layout: Any) -> WeightScheme:
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is {group!r}: only a scheme that is written out is supported")
    layout = group.get("format") or common_layout
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise CheckpointError(f"{where} is stored as {layout!r}: supported are {', '.join(_LAYOUTS)}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} says nothing about weights, which is not supported")
    _refuse_others(f"{where}.weights", weights, _WEIGHTS_OFF)
    formats, strategies = _LAYOUTS[layout]
    kind, bits = weights.get("type") or "int", weights.get("num_bits")
    form = formats.get((kind, bits)) if isinstance(kind, str) and type(bits) is int else None
    if form is None:
        known = " and ".join(f"{bits} ({kind})" for kind, bits in formats)
        raise CheckpointError(
            f"{where} has weights of {bits} bits ({kind!r:.20}): of {layout} only {known} are supported"
        )
    strategy, size = weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("channel" if size == -1 else "group")
    if strategy not in strategies:
        known = " or ".join(strategies)
        raise CheckpointError(
            f"{where} shares scales by strategy {strategy!r:.40}: supported are {', '.join(strategies)}"
        )
    rows, columns = _shared(where, strategy, weights, _GROUPS.get(layout, GROUP_SIZES))
    return WeightScheme(form, columns, weights.get("symmetric") is not False, rows)


def _shared(
    where: str, strategy: str, weights: Mapping[str, Any], groups: tuple[int, ...]
) -> tuple[int | None, int | None]:
    """Outputs and inputs that share a scale; None: all."""
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy == "block":
        block = weights.get("block_structure")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise CheckpointError(f"{where}.weights.block_structure is {block!r:.40}: it must be two positive numbers")
        return block[0], block[1]
    size = weights.get("group_size")
    if type(size) is not int or size not in groups:
        known = " or ".join(map(str, groups))
        raise CheckpointError(
            f"{where} shares scales by groups of {size!r:.40}: only {known} are supported, or channels"
        )
    return 1, size


def _refuse_others(where: str, found: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if found.get(key) not in values:
            raise CheckpointError(f"{where}.{key} is {found[key]!r}, which is not supported: it must be {values[-1]!r}")
