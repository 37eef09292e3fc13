"""Tiny random models, strong enough in their opinions that rounding never decides a token."""

from __future__ import annotations

from typing import Any

import torch

from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.state import PagedCache
from toy_recurrent import ToyRecurrent

VOCAB = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
MLA = {
    **_SHAPE,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
GQA = {
    **_SHAPE,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
}
SPARSE = {
    **MLA,
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "q_lora_rank": 24,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 12,
}
LONGCAT = {
    **MLA,
    "model_type": "longcat_flash",
    "architectures": ["LongcatFlashForCausalLM"],
    "num_layers": 1,
    "q_lora_rank": 24,
    "n_shared_experts": 0,
    "zero_expert_num": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
}
HY4 = {
    **SPARSE,
    "model_type": "hy_v4",
    "architectures": ["HYV4ForCausalLM"],
    "indexer_types": ["full", "shared"],
    "hc_mult": 2,
    "swiglu_limit": 1.5,
}
CONFIGS = {"mla": MLA, "gqa": GQA}
MTP = {**MLA, "num_nextn_predict_layers": 1}
SPARSE_MTP = {**SPARSE, "num_nextn_predict_layers": 1}
_HYBRID = {
    **MLA,
    "n_group": 2,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "head_dim": 16,
}
BAILING = {**_HYBRID, "model_type": "bailing_hybrid", "layer_group_size": 2, "num_nextn_predict_layers": 1}
KIMI = {**_HYBRID, "model_type": "kimi_linear", "layer_types": ["linear_attention", "full_attention"]}
GLM5 = {
    **_HYBRID,
    "model_type": "glm5_next_text",
    "layer_types": ["linear_attention", "indexed_attention"],
    "q_lora_rank": 24,
    "qk_rope_head_dim": 0,
    "index_topk": 8,
    "index_kpool": 4,
    "index_head_dim": 16,
    "index_n_heads": 12,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "swiglu_limit": 1.5,
}
POOLED = {**GLM5, "layer_types": ["indexed_attention"] * 2, "index_kpool": 2, "indexer_types": ["full", "shared"]}
for _config in (BAILING, KIMI, GLM5, POOLED):
    del _config["architectures"]
LING25 = {**BAILING, "architectures": ["BailingMoeV2_5ForCausalLM"], "group_norm_size": 2}
_HYBRIDS = {"bailing mtp": BAILING, "kimi": KIMI, "ling25 mtp": LING25, "glm5": GLM5, "pooled": POOLED}
_KINDS = (
    _HYBRIDS | {"longcat": LONGCAT} | CONFIGS | {"mtp": MTP, "sparse": SPARSE, "hy4": HY4, "sparse mtp": SPARSE_MTP}
)


def tiny_decoder(kind: str) -> Decoder:
    """A model of a kind; "hybrid ..." has a toy recurrent layer as its first."""
    torch.manual_seed(0)
    decoder = Decoder(read_config(_KINDS[kind.removeprefix("hybrid ")])).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith(("_hc.fn", "_hc.base", "_compress_ape")):
            torch.nn.init.normal_(parameter, std=0.5)
    if kind.startswith("hybrid"):
        decoder.model.layers[0].self_attn = ToyRecurrent(decoder.config.hidden_size)
    return decoder.requires_grad_(False)


def cache_for(
    decoder: Decoder, num_pages: int, page_size: int = 8, *, num_slots: int = 6, most_drafted: int = 5
) -> PagedCache:
    """A cache whose slots and rings hold garbage."""
    config = decoder.config
    specs = list(config.specs("fp32", mtp=decoder.dtype if decoder.mtp else None, most_drafted=most_drafted))
    for index, layer in enumerate(decoder.model.layers):
        if isinstance(layer.self_attn, ToyRecurrent):
            specs[index] = layer.self_attn.spec(most_drafted)
    cache = PagedCache(specs, num_pages, page_size=page_size, num_slots=num_slots)
    rings = [ring for index in range(len(specs)) if (ring := cache.view(index).rings) is not None]
    for tensor in (*cache.slot_storage, *rings):
        tensor.fill_(float("nan"))
    return cache
