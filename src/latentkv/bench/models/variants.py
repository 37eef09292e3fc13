"""A decoder made from a decoder, with multi-head attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from latentkv.errors import RequestError
from latentkv.models.config import GQAConfig, LayerConfig, MLAConfig, ModelConfig
from latentkv.models.decoder import Decoder
from latentkv.models.packing import Packing, pack_module


def mha_config(config: ModelConfig) -> ModelConfig:
    """The same model with multi-head attention that caches as many numbers as its expanded heads have.

    A head's key and value, Dn + R + Dv numbers, become a key and a value of half of that each.

    Raises:
        RequestError: the model has no latent attention.
    """
    return replace(config, layers=tuple(_mha_layer(layer, config) for layer in config.layers))


def _mha_layer(layer: LayerConfig, config: ModelConfig) -> LayerConfig:
    mla = layer.attention
    if not isinstance(mla, MLAConfig) or layer.rope is None:
        raise RequestError(f"A {config.model_type} model has no latent attention to compare with multi-head attention.")
    head_dim = (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim) // 2
    return replace(
        layer,
        attention=GQAConfig(num_kv_heads=config.num_heads, head_dim=head_dim),
        rope=replace(layer.rope, dim=head_dim),
    )


def mha_twin(decoder: Decoder, packing: Packing | None) -> Decoder:
    """`decoder` with random multi-head attention; everything else is shared with it.

    Args:
        decoder: with latent attention, packed or not.
        packing: how its weights are packed; None: not at all.
    """
    with torch.device("meta"):
        twin = Decoder(mha_config(decoder.config), max_context=decoder.max_context)
    for index, own in enumerate(decoder.model.layers):
        layer = twin.model.layers[index]
        layer.self_attn = _random(layer.get_submodule("self_attn"), decoder, packing, f"model.layers.{index}.self_attn")
        layer.mlp, layer.shortcut = own.mlp, own.shortcut
        layer.attn_hc, layer.ffn_hc = own.attn_hc, own.ffn_hc
        layer.input_layernorm, layer.post_attention_layernorm = own.input_layernorm, own.post_attention_layernorm
    twin.model.embed_tokens, twin.model.norm = decoder.model.embed_tokens, decoder.model.norm
    twin.model.hc_head = decoder.model.hc_head
    twin.packed_embedding = decoder.packed_embedding
    if not decoder.config.tie_word_embeddings:
        twin.lm_head = decoder.lm_head
    return twin.eval()


def _random(attention: nn.Module, like: Decoder, packing: Packing | None, name: str) -> nn.Module:
    attention = attention.to(like.dtype).to_empty(device=like.model.norm.weight.device)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=like.config.initializer_range)
    if packing is not None:
        pack_module(attention, packing, prefix=name)
    return attention
