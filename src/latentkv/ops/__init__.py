"""The hot functions, stateless, one signature each. `reference.py` is their definition in float64."""

from latentkv.ops.attention import gqa_attend, mla_attend, mla_decode
from latentkv.ops.backends import describe_backends
from latentkv.ops.causal import causal_attention
from latentkv.ops.choice import ChoiceRule, choose_tokens
from latentkv.ops.elementwise import apply_rope, gate_heads, gated_rms_norm, norm_beside, rms_norm, silu_mul, sink_heads
from latentkv.ops.headwise import headwise_linear
from latentkv.ops.hyper_connections import StreamMix, collapse_streams, expand_streams, gate_streams, mix_streams
from latentkv.ops.index_keys import pool_keys, rotate_first, write_index_keys, write_pooled_keys
from latentkv.ops.kda import KDAState, KDAWeights, kda_attend, kda_whole
from latentkv.ops.kv_formats import (
    KVFormat,
    decode_latents,
    encode_latents,
    latent_payload_bytes,
    latent_token_bytes,
    storage_dtype,
)
from latentkv.ops.lightning import LightningState, LightningWeights, lightning_attend, lightning_whole
from latentkv.ops.linear import linear, output_logits
from latentkv.ops.moe import gated_mlp, moe_experts
from latentkv.ops.pages import norm_rope_write, read_latents, write_latents
from latentkv.ops.prefill import mla_prefill
from latentkv.ops.routing import select_experts
from latentkv.ops.sparse import best_tokens, index_scores, select_slots, weigh_heads
from latentkv.ops.states import merge_states
from latentkv.ops.swiglu_limit import SwigluLimit

__all__ = [
    "ChoiceRule",
    "KDAState",
    "KDAWeights",
    "KVFormat",
    "LightningState",
    "LightningWeights",
    "StreamMix",
    "SwigluLimit",
    "apply_rope",
    "best_tokens",
    "causal_attention",
    "choose_tokens",
    "collapse_streams",
    "decode_latents",
    "describe_backends",
    "encode_latents",
    "expand_streams",
    "gate_heads",
    "gate_streams",
    "gated_mlp",
    "gated_rms_norm",
    "gqa_attend",
    "headwise_linear",
    "index_scores",
    "kda_attend",
    "kda_whole",
    "latent_payload_bytes",
    "latent_token_bytes",
    "lightning_attend",
    "lightning_whole",
    "linear",
    "merge_states",
    "mix_streams",
    "mla_attend",
    "mla_decode",
    "mla_prefill",
    "moe_experts",
    "norm_beside",
    "norm_rope_write",
    "output_logits",
    "pool_keys",
    "read_latents",
    "rms_norm",
    "rotate_first",
    "select_experts",
    "select_slots",
    "silu_mul",
    "sink_heads",
    "storage_dtype",
    "weigh_heads",
    "write_index_keys",
    "write_latents",
    "write_pooled_keys",
]
