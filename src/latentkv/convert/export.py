"""Latent attention without a norm -> the checkpoint of DeepSeek-V3, whose latents pass through an RMSNorm.

The norm w c / sqrt(mean c^2 + eps) is linear where c is small beside sqrt(eps): the latent's rows are multiplied by
2^-40, which is exact in bf16 and float32 and leaves a mean square below 1e-20 beside eps = 1e-6. The norm is then the
constant 1 / sqrt(eps), which its weight (a power of two) and kv_b undo. A bias of the queries goes through the query's
own bottleneck in the same way, with one latent that is the constant one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentkv.convert.attention import MLAWeights

DOWN_EXPONENT = -40
NORM_EXPONENT = 30
BIAS_COLUMNS = 16  # the constant one and zeros, so that the width stays a multiple of 16


def export_layer(weights: MLAWeights, *, eps: float) -> dict[str, Tensor]:
    """{name under self_attn: tensor} of DeepSeek-V3's attention, float64.

    Args:
        weights: of the layer.
        eps: of the latents' norms, see `export_config.latent_norm_eps`.
    """
    down = 2.0**DOWN_EXPONENT
    restore = 2.0 ** -(DOWN_EXPONENT + NORM_EXPONENT) * math.sqrt(eps)
    rank = weights.kv_b.shape[1]
    kv_a = weights.kv_a.clone()
    kv_a[:rank] *= down
    tensors = {
        "kv_a_proj_with_mqa.weight": kv_a,
        "kv_a_layernorm.weight": torch.full((rank,), 2.0**NORM_EXPONENT, dtype=torch.float64),
        "kv_b_proj.weight": weights.kv_b * restore,
        "o_proj.weight": weights.o,
    }
    if not has_biases(weights):
        return tensors | {"q_proj.weight": weights.q}
    hidden = weights.q.shape[1]
    q_a = torch.cat([torch.eye(hidden, dtype=torch.float64), torch.zeros(BIAS_COLUMNS, hidden, dtype=torch.float64)])
    one = torch.zeros(hidden + BIAS_COLUMNS, dtype=torch.float64)
    one[hidden] = 1
    q_b = torch.zeros(weights.q.shape[0], hidden + BIAS_COLUMNS, dtype=torch.float64)
    q_b[:, :hidden] = weights.q
    if weights.q_bias is not None:
        q_b[:, hidden] = weights.q_bias
    zeros = torch.zeros(len(kv_a), dtype=torch.float64)
    return tensors | {
        "q_a_proj.weight": q_a * down,
        "q_a_proj.bias": one * down,
        "q_a_layernorm.weight": torch.full((len(q_a),), 2.0**NORM_EXPONENT, dtype=torch.float64),
        "q_b_proj.weight": q_b * restore,
        "kv_a_proj_with_mqa.bias": zeros if weights.kv_a_bias is None else weights.kv_a_bias,
        "o_proj.bias": torch.zeros(len(weights.o), dtype=torch.float64) if weights.o_bias is None else weights.o_bias,
    }


def has_biases(weights: MLAWeights) -> bool:
    """Whether DeepSeek's `attention_bias` is needed."""
    return any(bias is not None for bias in (weights.q_bias, weights.kv_a_bias, weights.o_bias))
