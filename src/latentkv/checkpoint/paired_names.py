"""Names of LongCat-Flash, each of whose layers is two of a decoder's: two attentions and two dense blocks, and experts.

Layer i of its files is the decoder's layers 2i and 2i + 1. The experts, whose result is added at the end, are the
second's, beside its dense block: both are called `mlp` there, and no two of their tensors alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = r"(?<=\blayers\.)(\d+)\."
_TWIN = re.compile(_LAYER + r"(self_attn|mlps|input_layernorm|post_attention_layernorm)\.([01])\.")
_EXPERTS = re.compile(_LAYER + r"mlp\.")
_ROUTER = {
    ".mlp.router.classifier.weight": ".mlp.gate.weight",
    ".mlp.router.e_score_correction_bias": ".mlp.gate.e_score_correction_bias",
}
_DENSE = re.compile(r"mlp\.(?=(?:gate|up|down)_proj\b)")
_FURTHER_TOKENS = re.compile(r"\bmtp\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.\d+\.)(gate|up|down)_proj\b.*")


def is_paired(names: Iterable[str]) -> bool:
    """Whether a checkpoint's tensors are called as LongCat-Flash's."""
    return any(_TWIN.search(name) for name in names)


def from_paired(names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint's own names mean: {name in the file: as everybody else calls it}.

    Modules of further tokens are left out, and what transformers writes for zero experts: weights into them, and none
    out of them.
    """
    found = {name: _unpaired(name) for name in names if not _FURTHER_TOKENS.search(name)}
    experts = {name: match for name, known_as in found.items() if (match := _EXPERT.fullmatch(known_as))}
    computed = {match[1] for match in experts.values() if match[2] == "down"}
    return {name: known_as for name, known_as in found.items() if name not in experts or experts[name][1] in computed}


def as_paired(name: str) -> str:
    """A tensor's name as LongCat-Flash has it."""
    match = re.search(_LAYER, name)
    if match is None:
        return name
    pair, half = divmod(int(match[1]), 2)
    before, rest = name[: match.start()], name[match.end() :]
    if rest.startswith("mlp.") and not _DENSE.match(rest):
        for theirs, ours in _ROUTER.items():
            rest = f".{rest}".replace(ours, theirs).removeprefix(".")
        return f"{before}{pair}.{rest}"
    module, _, leaf = rest.partition(".")
    return f"{before}{pair}.{'mlps' if module == 'mlp' else module}.{half}.{leaf}"


def _unpaired(name: str) -> str:
    name, twins = _TWIN.subn(_half, name)
    if twins:
        return name
    for theirs, ours in _ROUTER.items():
        name = name.replace(theirs, ours)
    return _EXPERTS.sub(lambda match: f"{2 * int(match[1]) + 1}.mlp.", name)


def _half(match: re.Match[str]) -> str:
    layer, module, half = match.groups()
    return f"{2 * int(layer) + int(half)}.{'mlp' if module == 'mlps' else module}."
