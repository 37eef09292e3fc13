"""What a tensor is called in a published checkpoint, and what it is called in the decoder.

A decoder's names are the Hugging Face names but for seven things: routed experts are fused into one tensor a layer, the
short convolutions of q, k and v are one, multi-token-prediction layers are `mtp.{k}.*` instead of
`model.layers.{num_layers + k}.*`, A.X-K1's post-MLP norm belongs to the MLP, experts at the end of a shortcut are
`shortcut.*` instead of `mlp.*`, hyper-connections and the gate of pools are modules (`attn_hc.fn` for `hc_attn_fn`),
and what Mixtral, Ling-3.0, LongCat-Flash and Hy4 call otherwise (`block_sparse_moe.experts.0.w1`, `attention.dense`,
`self_attn.1`, `linear_gate`) is called as everybody else's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from latentkv.checkpoint.hy_names import as_hy, from_hy, predicts_further
from latentkv.checkpoint.paired_names import as_paired, from_paired, is_paired
from latentkv.errors import CheckpointError

ExpertNames = Literal["one by one", "fused", "mixtral"]
"""How a checkpoint has routed experts: one by one, stacked, or one by one under Mixtral's names."""

NameStyle = Literal["usual", "bailing", "paired", "hy"]
"""Whose names a checkpoint has for what is not an expert: everybody's, or those of Ling-3.0, LongCat-Flash or Hy4."""

_MTP = re.compile(r"mtp\.(\d+)\.(layer\.|norm\.|)(.+)")
_MTP_PARTS = {"layer.": "", "norm.": "shared_head.norm.", "": ""}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MIXTRAL_BLOCK = ".block_sparse_moe."
_MIXTRAL_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)\.(w[123])\.")
_MIXTRAL_WEIGHTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_BAILING = {
    ".attention.": ".self_attn.",
    ".self_attn.dense.": ".self_attn.o_proj.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
    ".final_layernorm.": ".shared_head.norm.",
}
"""What layers of Ling-3.0 call otherwise, in the order in which it is renamed."""
_BAILING_EMBEDDING = "word_embeddings.weight"
_TAPS, _CONVOLUTIONS = ".conv_taps", ("q_conv1d", "k_conv1d", "v_conv1d")
_HYPER_CONNECTION = re.compile(r"\.(attn|ffn)_hc\.(fn|base|scale)$")
_POOL_GATE = ".index_kpool_compress_gate"
_ROUTER = ".gate.weight"
_POST_NORM, _PUBLISHED_POST_NORM = ".mlp.post_mlp_layernorm.", ".post_mlp_layernorm."
_SHORTCUT, _PUBLISHED_SHORTCUT = ".shortcut.", ".mlp."

# Up to the layers of one of a checkpoint's models: what stands before tells which of them.
_BEFORE_LAYERS = re.compile(r"((?:[^.]+\.)*?)layers\.\d+\.")
# Parts of a prefix that say that other models stand beside the text model.
_TEXT_AMONG_OTHERS = re.compile(r"language|text|llm|thinker")
_WRAPPER = re.compile(r"_\w*mod(ule)?")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_PARTS_OF_TEXT = ("embed_tokens.", "layers.", "norm.", "hc_head.")

# A tensor is of the first kind of which its published name contains the mark.
_KINDS: Mapping[str, str] = {
    "embed_tokens": "embedding",
    "lm_head": "lm head",
    "shared_head.head": "lm head",
    "norm": "norms",
    "self_attn": "attention",
    "shared_expert_gate": "router",
    "shared_expert": "shared experts",
    "mlp.experts": "routed experts",
    "mlp.gate.": "router",
    "mlp.": "dense mlp",
    "eh_proj": "mtp input",
    ".hc_": "hyper-connections",
}


def tensor_kind(published: str) -> str:
    """What a checkpoint's tensor is part of: "attention", "routed experts", "norms", ..., or "other"."""
    return next((kind for mark, kind in _KINDS.items() if mark in published), "other")


def published_name(name: str, num_layers: int) -> str:
    """What a decoder's tensor is called in a checkpoint (routed experts aside: see `published_parts`)."""
    if match := _MTP.fullmatch(name):
        k, part, rest = match.groups()
        name = f"model.layers.{num_layers + int(k)}.{_MTP_PARTS[part]}{rest}"
    if name.endswith(f"{_POOL_GATE}.weight"):
        name = name.removesuffix(".weight")
    name = _HYPER_CONNECTION.sub(r".hc_\1_\2", name)
    return name.replace(_POST_NORM, _PUBLISHED_POST_NORM).replace(_SHORTCUT, _PUBLISHED_SHORTCUT)


def published_parts(
    name: str, tensor: Tensor, num_layers: int, fused: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's names for one tensor of a decoder, each with its view of that tensor.

    Args:
        name: in the decoder.
        tensor: experts are [E, 2I, D] (gate over up) or [E, D, I] (down), taps of convolutions [4, 3 W].
        num_layers: of the decoder, MTP layers not counted.
        fused: names under which the checkpoint holds experts fused, in our own layout; others are one by one.
    """
    published = published_name(name, num_layers)
    stem, _, leaf = published.rpartition(".")
    if published.endswith(_TAPS):
        for convolution, taps in zip(_CONVOLUTIONS, tensor.chunk(3, dim=1), strict=True):
            yield f"{stem}.{convolution}.weight", taps.T[:, None]
        return
    if not stem.endswith(".mlp.experts") or published in fused:
        yield published, tensor
        return
    for expert, weight in enumerate(tensor):
        if leaf == "gate_up_proj":
            gate, up = weight.chunk(2)
            yield f"{stem}.{expert}.gate_proj.weight", gate
            yield f"{stem}.{expert}.up_proj.weight", up
        else:
            yield f"{stem}.{expert}.{leaf}.weight", weight


def export_names(
    state: Mapping[str, Tensor],
    *,
    num_layers: int,
    experts: ExpertNames = "one by one",
    style: NameStyle = "usual",
    num_zero_experts: int = 0,
    empty_shared: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs to save a decoder in its published layout, which transformers loads.

    Args:
        state: the decoder's `state_dict()`.
        num_layers: of the decoder, MTP layers not counted.
        experts: how the layout has routed experts.
        style: whose names it has for the rest.
        num_zero_experts: of each layer that has experts.
        empty_shared: whether it has shared experts where the decoder has none (see `empty_shared_experts`).
    """
    for name, tensor in state.items():
        published = published_name(name, num_layers)
        fused = (published,) if experts == "fused" else ()
        parts = published_parts(name, tensor, num_layers, fused)
        for part, view in (*parts, *_parts_of_zero_experts(published, tensor, num_zero_experts)):
            known_as = _as_mixtral(part) if experts == "mixtral" else part
            yield _STYLES[style](known_as), view
        if empty_shared and published.endswith(_ROUTER):
            block = published.removesuffix(_ROUTER)
            yield from empty_shared_experts(block, tensor.shape[-1], tensor.dtype).items()


def empty_shared_experts(block: str, hidden_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """{name: tensor} of shared experts without width, which transformers 5.23 looks for where a config counts none.

    Args:
        block: name of the experts' block, `model.layers.0.mlp` or the like.
        hidden_size: of the model.
        dtype: of its weights.
    """
    inward, outward = torch.empty(0, hidden_size, dtype=dtype), torch.empty(hidden_size, 0, dtype=dtype)
    stem = f"{block}.shared_experts."
    return {f"{stem}gate_proj.weight": inward, f"{stem}up_proj.weight": inward, f"{stem}down_proj.weight": outward}


def _parts_of_zero_experts(published: str, tensor: Tensor, count: int) -> Iterator[tuple[str, Tensor]]:
    """The weights into experts that compute nothing, without which transformers 5.23 loads no others; zeros."""
    stem, _, leaf = published.rpartition(".")
    if leaf == "gate_up_proj":
        for expert in range(len(tensor), len(tensor) + count):
            for part in ("gate_proj", "up_proj"):
                yield f"{stem}.{expert}.{part}.weight", tensor.new_zeros(tensor.shape[1] // 2, tensor.shape[2])


def inside_wrapper(name: str) -> str:
    """What a text model's tensor is called where the text model lies in a wrapper, beside a vision tower."""
    return re.sub(r"^model\.", "model.language_model.", name)


def _as_bailing(name: str) -> str:
    """A tensor's name as Ling-3.0 has it."""
    for theirs, ours in reversed(_BAILING.items()):
        name = name.replace(ours, theirs)
    return name.replace(_EMBEDDING, _BAILING_EMBEDDING)


_STYLES: Mapping[NameStyle, Callable[[str], str]] = {
    "usual": lambda name: name,
    "bailing": _as_bailing,
    "paired": as_paired,
    "hy": as_hy,
}


def _from_bailing(name: str) -> str:
    if "layers." not in name:
        return name.replace(_BAILING_EMBEDDING, _EMBEDDING)
    for theirs, ours in _BAILING.items():
        name = name.replace(theirs, ours)
    return name


def _as_mixtral(name: str) -> str:
    """A tensor's name as Mixtral has it."""
    if not any(part in name for part in (".mlp.gate.", ".mlp.experts.", ".mlp.shared_experts.")):
        return name
    for theirs, ours in _MIXTRAL_WEIGHTS.items() if ".mlp.experts." in name else ():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".mlp.", _MIXTRAL_BLOCK)


def _from_mixtral(name: str) -> str:
    name = name.replace(_MIXTRAL_BLOCK, ".mlp.")
    return _MIXTRAL_EXPERT.sub(lambda match: f"{match[1]}.{_MIXTRAL_WEIGHTS[match[2]]}.", name)


def text_model_names(names: Iterable[str], *, nested: bool = False, tied: bool = False) -> dict[str, str]:
    """What a checkpoint's own names mean: {published name: name in the file}, of the text model only.

    Whatever stands before all of the text model's names is found and taken off. Tensors of other models beside it are
    left out, and so are rotary frequencies, which some old checkpoints carry: they follow from the config.

    Args:
        names: of all tensors.
        nested: the config describes the text model inside a larger one, whose other parts are beside it.
        tied: the output head is the embedding, which may be stored as either.

    Raises:
        CheckpointError: two tensors mean the same.
    """
    plain = {
        name: from_hy(_from_bailing(_without_wrappers(name)))
        for name in names
        if not name.endswith("rotary_emb.inv_freq") and not predicts_further(name)
    }
    if is_paired(plain.values()):
        meant = from_paired(plain.values())
        plain = {name: meant[known_as] for name, known_as in plain.items() if known_as in meant}
    prefix = _text_prefix(plain.values())
    head = max((n.removesuffix(_HEAD) for n in plain.values() if _is_head(n, prefix)), key=len, default="")
    parent = prefix.removesuffix("model.")
    among_others = nested or _TEXT_AMONG_OTHERS.search(prefix) is not None
    found: dict[str, str] = {}
    for name, known_as in plain.items():
        inner = known_as.removeprefix(prefix)
        if known_as.startswith(f"{head}lm_head."):
            published = known_as.removeprefix(head)
        elif known_as.startswith(prefix) and (not nested or inner.startswith(_PARTS_OF_TEXT)):
            published = _from_mixtral(f"model.{inner}".replace(_POST_NORM, _PUBLISHED_POST_NORM))
        elif nested or (among_others and not known_as.startswith(parent)):
            continue
        else:
            published = known_as.removeprefix(parent)
        if published in found:
            raise CheckpointError(f"{found[published]} and {name} are both {published}: remove one of the two")
        found[published] = name
    if tied and f"model.{_EMBEDDING}" not in found and _HEAD in found:
        found[f"model.{_EMBEDDING}"] = found.pop(_HEAD)
    return found


def _text_prefix(names: Iterable[str]) -> str:
    """What the names of the text model begin with in place of "model."; of several models the one that embeds tokens
    and has the most tensors."""
    names = frozenset(names)
    tensors = Counter(match[1] for name in names if (match := _BEFORE_LAYERS.match(name)))
    for end in (_EMBEDDING, "norm.weight", ""):
        candidates = [prefix for prefix in tensors if not end or prefix + end in names]
        if candidates:
            return max(candidates, key=lambda prefix: (tensors[prefix], -len(prefix)))
    return "model."


def _is_head(name: str, prefix: str) -> bool:
    """Whether a tensor is the output head of the model whose names begin with `prefix`."""
    return name.endswith(_HEAD) and prefix.startswith(name.removesuffix(_HEAD))


def _without_wrappers(name: str) -> str:
    """A name without what torch.compile and FSDP put between its parts ("_orig_mod", "_fsdp_wrapped_module")."""
    return ".".join(part for part in name.split(".") if not _WRAPPER.fullmatch(part))


def layer_of(published: str) -> int | None:
    """The number of the layer that a checkpoint's tensor belongs to."""
    match = _LAYER.match(published)
    return int(match[1]) if match else None


def mtp_index(name: str) -> int | None:
    """The k of a decoder's `mtp.{k}.*`."""
    match = _MTP.match(name)
    return int(match[1]) if match else None
