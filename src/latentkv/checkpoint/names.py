"""What a tensor is called in a published checkpoint, and what it is called in the decoder.

A decoder's names are the Hugging Face names but for three things: routed experts are fused into one tensor a layer,
multi-token-prediction layers are `mtp.{k}.*` instead of `model.layers.{num_layers + k}.*`, and A.X-K1's post-MLP norm
belongs to the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping

from torch import Tensor

_MTP = re.compile(r"mtp\.(\d+)\.(layer\.|norm\.|)(.+)")
_MTP_PARTS = {"layer.": "", "norm.": "shared_head.norm.", "": ""}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_POST_NORM, _PUBLISHED_POST_NORM = ".mlp.post_mlp_layernorm.", ".post_mlp_layernorm."

# Wrappers (text and vision) put the text model under `language_model.`; transformers 5 under `model.language_model.`.
_WRAPPED = ("language_model.", "model.language_model.")
_VISION = re.compile(r"(model\.)?(vision_\w+|visual|image_\w+|multi_modal_projector|mm_projector|patch_merger)\.")

# A tensor is of the first kind of which its published name contains the mark.
_KINDS: Mapping[str, str] = {
    "embed_tokens": "embedding",
    "lm_head": "lm head",
    "shared_head.head": "lm head",
    "norm": "norms",
    "self_attn": "attention",
    "shared_experts": "shared experts",
    "mlp.experts": "routed experts",
    "mlp.gate.": "router",
    "mlp.": "dense mlp",
    "eh_proj": "mtp input",
}


def tensor_kind(published: str) -> str:
    """What a checkpoint's tensor is part of: "attention", "routed experts", "norms", ..., or "other"."""
    return next((kind for mark, kind in _KINDS.items() if mark in published), "other")


def published_name(name: str, num_layers: int) -> str:
    """What a decoder's tensor is called in a checkpoint (routed experts aside: see `published_parts`)."""
    if match := _MTP.fullmatch(name):
        k, part, rest = match.groups()
        name = f"model.layers.{num_layers + int(k)}.{_MTP_PARTS[part]}{rest}"
    return name.replace(_POST_NORM, _PUBLISHED_POST_NORM)


def published_parts(
    name: str, tensor: Tensor, num_layers: int, fused: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's names for one tensor of a decoder, each with its view of that tensor.

    Args:
        name: in the decoder.
        tensor: experts are [E, 2I, D] (gate over up) or [E, D, I] (down).
        num_layers: of the decoder, MTP layers not counted.
        fused: names under which the checkpoint holds experts fused, in our own layout; others are one by one.
    """
    published = published_name(name, num_layers)
    stem, _, leaf = published.rpartition(".")
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
    state: Mapping[str, Tensor], *, num_layers: int, fused_experts: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs to save a decoder in its published layout, which transformers loads.

    Args:
        state: the decoder's `state_dict()`.
        num_layers: of the decoder, MTP layers not counted.
        fused_experts: keep routed experts fused (Mistral 4's layout) instead of one by one.
    """
    for name, tensor in state.items():
        fused = (published_name(name, num_layers),) if fused_experts else ()
        yield from published_parts(name, tensor, num_layers, fused)


def text_model_names(names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint's own names mean: {published name: name in the file}, of the text model only.

    A text model inside a vision wrapper loses its prefix, and the vision tensors are left out. So are rotary
    frequencies, which some old checkpoints carry: they follow from the config.
    """
    names = tuple(names)
    wrapped = any(name.startswith(_WRAPPED) for name in names)
    found: dict[str, str] = {}
    for name in names:
        if name.endswith("rotary_emb.inv_freq") or (wrapped and _VISION.match(name)):
            continue
        published = _unwrapped(name) if wrapped else name
        found[published.replace(_POST_NORM, _PUBLISHED_POST_NORM)] = name
    return found


def layer_of(published: str) -> int | None:
    """The number of the layer that a checkpoint's tensor belongs to."""
    match = _LAYER.match(published)
    return int(match[1]) if match else None


def mtp_index(name: str) -> int | None:
    """The k of a decoder's `mtp.{k}.*`."""
    match = _MTP.match(name)
    return int(match[1]) if match else None


def _unwrapped(name: str) -> str:
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")
