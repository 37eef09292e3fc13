"""Ling-2.5 in float64, written from the published formulas: every pair of tokens by itself, no state, no cache.

Source: github.com/inclusionAI/Ring-V2.5, models/modeling_bailing_moe_v2_5.py. Tensors have their published names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Config = Mapping[str, Any]
SMALL: dict[str, Any] = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "num_experts": 12,
    "num_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "linear_silu": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "rope_interleave": True,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHER = SMALL | {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 20,
    "partial_rotary_factor": 0.4,
    "group_norm_size": 5,
    "q_lora_rank": None,
    "layer_group_size": 4,
    "first_k_dense_replace": 2,
    "num_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-4,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "beta_fast": 0.8,
        "beta_slow": 0.05,
    },
}


def is_latent(config: Config, layer: int) -> bool:
    """Whether a layer, or an MTP module, is latent attention."""
    return (layer + 1) % config["layer_group_size"] == 0 or layer >= config["num_hidden_layers"]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor by its published name."""
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers + config["num_nextn_predict_layers"]):
        own = _latent(config) if is_latent(config, layer) else _lightning(config)
        own |= _mlp(config, dense=layer < config["first_k_dense_replace"])
        own |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        if layer >= layers:
            own |= dict.fromkeys(("enorm", "hnorm", "final_layernorm"), (hidden,)) | {"eh_proj": (hidden, 2 * hidden)}
        for name, shape in own.items():
            suffix = "" if name.endswith("expert_bias") else ".weight"
            found[f"model.layers.{layer}.{name}{suffix}"] = shape
    return found


def _lightning(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    width = config["num_attention_heads"] * dim
    return {
        "attention.query_key_value": (3 * width, hidden),
        "attention.query_layernorm": (dim,),
        "attention.key_layernorm": (dim,),
        "attention.g_proj": (width, hidden),
        "attention.g_norm": (width,),
        "attention.dense": (hidden, width),
    }


def _latent(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank, own_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
    )
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries: dict[str, tuple[int, ...]] = {"attention.q_proj": (heads * (nope + rope), hidden)}
    if own_rank:
        queries = {
            "attention.q_a_proj": (own_rank, hidden),
            "attention.q_a_layernorm": (own_rank,),
            "attention.q_b_proj": (heads * (nope + rope), own_rank),
        }
    return queries | {
        "attention.kv_a_proj_with_mqa": (rank + rope, hidden),
        "attention.kv_a_layernorm": (rank,),
        "attention.kv_b_proj": (heads * (nope + value), rank),
        "attention.dense": (hidden, heads * value),
    }


def _mlp(config: Config, *, dense: bool) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]

    def block(name: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.gate_proj": (inner, hidden),
            f"{name}.up_proj": (inner, hidden),
            f"{name}.down_proj": (hidden, inner),
        }

    if dense:
        return block("mlp", config["intermediate_size"])
    found = {"mlp.gate": (experts, hidden), "mlp.gate.expert_bias": (experts,)}
    for expert in range(experts):
        found |= block(f"mlp.experts.{expert}", width)
    return found | block("mlp.shared_experts", width * config["num_shared_experts"])


def write_checkpoint(folder: Path, config: Config) -> dict[str, Tensor]:
    """A random checkpoint as published, and its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.3 * drawn
        else:
            tensors[name] = drawn * (0.1 if name.endswith("expert_bias") else 1.5 / math.sqrt(shape[-1]))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


class Ling25:
    """The model. `slope_layer` says which number the slope of layer i has, counted from 0."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor], *, slope_layer: int = 0) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.slope_layer = slope_layer

    def hidden(self, ids: list[int]) -> Tensor:
        """[T, hidden] before the output head."""
        x = self.tensors["model.word_embeddings.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            x = self.layer(layer, x, torch.arange(len(ids)))
        return self.norm("model.norm", x)

    def logits(self, ids: list[int]) -> Tensor:
        """[T, V]."""
        return self.hidden(ids) @ self.tensors["lm_head.weight"].T

    def mtp_hidden(self, ids: list[int]) -> Tensor:
        """[T - 1, hidden] of the module: row i has seen tokens up to i + 1."""
        layer = self.config["num_hidden_layers"]
        prefix, following = f"model.layers.{layer}", self.tensors["model.word_embeddings.weight"][ids[1:]]
        both = self.norm(f"{prefix}.enorm", following), self.norm(f"{prefix}.hnorm", self.hidden(ids)[:-1])
        x = self.layer(layer, self.linear(f"{prefix}.eh_proj", torch.cat(both, dim=1)), torch.arange(1, len(ids)))
        return self.norm(f"{prefix}.final_layernorm", x)

    def layer(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}"
        attend = self.latent if is_latent(self.config, layer) else self.lightning
        x = x + attend(layer, self.norm(f"{prefix}.input_layernorm", x), positions)
        h = self.norm(f"{prefix}.post_attention_layernorm", x)
        return x + (self.swiglu(f"{prefix}.mlp", h) if self.is_dense(layer) else self.experts(f"{prefix}.mlp", h))

    def is_dense(self, layer: int) -> bool:
        return layer < self.config["first_k_dense_replace"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        scale = torch.sqrt(x.square().mean(-1, keepdim=True) + (self.config["rms_norm_eps"] if eps is None else eps))
        return x / scale * self.tensors[f"{name}.weight"]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R / 2] with the attention factor, frequencies as transformers computes them."""
        scaling = self.config["rope_scaling"] or {"type": "default"}
        dim = self.config["qk_rope_head_dim"]
        parameters = {**scaling, "rope_type": scaling["type"], "rope_theta": self.config["rope_theta"]}
        config = LlamaConfig(
            head_dim=dim,
            hidden_size=dim,
            num_attention_heads=1,
            max_position_embeddings=self.config["max_position_embeddings"],
            rope_parameters=parameters,
        )
        if scaling["type"] == "default":
            frequencies, factor = self.config["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim), 1.0
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["type"]](config, torch.device("cpu"))
        turned = positions.double()[:, None] * frequencies.double()
        return turned.cos() * factor, turned.sin() * factor

    def lightning(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """o_t = sum over s <= t of exp(g (t - s)) (q_t . k_s) v_s / sqrt(D)."""
        prefix, config = f"model.layers.{layer}.attention", self.config
        heads, dim = config["num_attention_heads"], config["head_dim"]
        q, k, v = self.linear(f"{prefix}.query_key_value", x).view(len(x), 3, heads, dim).unbind(1)
        cos, sin = (each[:, None] for each in self.angles(positions))
        half = cos.shape[-1]

        def turn(name: str, t: Tensor) -> Tensor:
            t = self.norm(f"{prefix}.{name}", t)
            a, b = t[..., :half], t[..., half : 2 * half]
            return torch.cat([a * cos - b * sin, a * sin + b * cos, t[..., 2 * half :]], dim=-1)

        q, k = turn("query_layernorm", q), turn("key_layernorm", k)
        paces = alibi_slopes(heads) * (1 - (layer + self.slope_layer) / (config["num_hidden_layers"] - 1) + 1e-5)
        ago = positions[:, None] - positions
        decay = torch.exp(-paces[:, None, None] * ago).where(ago >= 0, 0.0)
        o = torch.einsum("hts,hts,shd->thd", torch.einsum("thd,shd->hts", q, k), decay, v) / math.sqrt(dim)
        groups = o.reshape(len(x), config["group_norm_size"], -1)
        normed = groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + config["rms_norm_eps"])
        gated = (
            normed.flatten(1) * self.tensors[f"{prefix}.g_norm.weight"] * self.linear(f"{prefix}.g_proj", x).sigmoid()
        )
        return self.linear(f"{prefix}.dense", gated)

    def latent(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        prefix, config = f"model.layers.{layer}.attention", self.config
        heads, rank, nope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_nope_head_dim"]
        cos, sin = self.angles(positions)

        def turn(t: Tensor) -> Tensor:  # [T, H, R], pairs of neighbours
            a, b, c, s = t[..., ::2], t[..., 1::2], cos[:, None], sin[:, None]
            return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

        if config["q_lora_rank"]:
            latent = self.norm(f"{prefix}.q_a_layernorm", self.linear(f"{prefix}.q_a_proj", x), 1e-6)
            q = self.linear(f"{prefix}.q_b_proj", latent)
        else:
            q = self.linear(f"{prefix}.q_proj", x)
        q = q.view(len(x), heads, -1)
        q = torch.cat([q[..., :nope], turn(q[..., nope:])], dim=-1)
        both = self.linear(f"{prefix}.kv_a_proj_with_mqa", x)
        k_rope = turn(both[:, None, rank:]).expand(-1, heads, -1)
        kv = self.linear(f"{prefix}.kv_b_proj", self.norm(f"{prefix}.kv_a_layernorm", both[:, :rank], 1e-6))
        kv = kv.view(len(x), heads, -1)
        k, v = torch.cat([kv[..., :nope], k_rope], dim=-1), kv[..., nope:]
        scale, scaling = q.shape[-1] ** -0.5, config["rope_scaling"]
        if scaling and scaling.get("mscale_all_dim"):
            scale *= (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1) ** 2
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        scores = scores.masked_fill(positions[:, None] < positions, float("-inf"))
        return self.linear(f"{prefix}.dense", torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate * gate.sigmoid() * self.linear(f"{name}.up_proj", x))

    def experts(self, name: str, x: Tensor) -> Tensor:
        config, outs = self.config, list[Tensor]()
        for row in x:
            scores = self.linear(f"{name}.gate", row).sigmoid()
            biased = scores + self.tensors[f"{name}.gate.expert_bias"]
            groups = biased.view(config["n_group"], -1)
            best = groups.topk(2, dim=-1).values.sum(-1).topk(config["topk_group"]).indices
            allowed = torch.full_like(groups, float("-inf"))
            allowed[best] = groups[best]
            chosen = allowed.flatten().topk(config["num_experts_per_tok"]).indices
            weights = scores[chosen] / scores[chosen].sum() * config["routed_scaling_factor"]
            routed = [
                weight * self.swiglu(f"{name}.experts.{expert}", row)
                for weight, expert in zip(weights, chosen.tolist(), strict=True)
            ]
            outs.append(torch.stack(routed).sum(0) + self.swiglu(f"{name}.shared_experts", row))
        return torch.stack(outs)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's (arXiv 2108.12409): of the next smaller power of two, then every second one of the next larger."""

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(heads))
    return torch.tensor((of_power(power) + of_power(2 * power)[::2])[:heads], dtype=torch.float64)
