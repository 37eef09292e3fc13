"""The arms of a comparison: one decoder under several attentions, as a config.json each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentkv.compare.sizes import BASELINE, MAX_POSITIONS, WIDTH_STEP, Sizes
from latentkv.errors import RequestError
from latentkv.models.config import ModelConfig
from latentkv.models.config_reader import read_config
from latentkv.plan import count_parameters

_LEAST_RANK = 4
_MOST_DIGITS = 5  # of a rank or of groups: more than any model's width has


@dataclass(frozen=True)
class Arm:
    """One attention. Of `num_kv_heads` (MHA, GQA, MQA) and `rank` (MLA) one is set.

    Attributes:
        name: mha, gqa-G, mqa or mla-R.
        num_kv_heads: G, key/value heads.
        rank: R, width of the latent.
    """

    name: str
    num_kv_heads: int | None = None
    rank: int | None = None

    def cached_numbers(self, sizes: Sizes) -> int:
        """Numbers cached for a token in all layers: 2 G d, or R + rope_dim, a layer."""
        if self.rank is not None:
            return sizes.num_layers * (self.rank + sizes.rope_dim)
        return sizes.num_layers * 2 * (self.num_kv_heads or 0) * sizes.head_dim

    def config_json(self, sizes: Sizes, width: int) -> dict[str, Any]:
        """Its config.json, with a feed-forward layer `width` wide."""
        common = {
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": width,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "initializer_range": sizes.init_std,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        if self.rank is None:
            return {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                **common,
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": sizes.head_dim,
                "mlp_bias": False,
            }
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **common,
            "num_key_value_heads": sizes.num_heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": sizes.head_dim,
            "qk_rope_head_dim": sizes.rope_dim,
            "v_head_dim": sizes.head_dim,
            "rope_interleave": True,
            # All layers are dense; the keys of the experts must be there and make sense all the same.
            "first_k_dense_replace": sizes.num_layers,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": width,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 0,
        }

    def config(self, sizes: Sizes, width: int) -> ModelConfig:
        """`config_json`, read."""
        return read_config(self.config_json(sizes, width))


def parse_arm(name: str, sizes: Sizes) -> Arm:
    """The arm of this name.

    Raises:
        RequestError: there is none, or these sizes do not allow it.
    """
    kind, _, number = name.partition("-")
    if name == "mha":
        return Arm(name, num_kv_heads=sizes.num_heads)
    if name == "mqa":
        return Arm(name, num_kv_heads=1)
    if kind in ("gqa", "mla") and number.isdecimal() and len(number) <= _MOST_DIGITS and int(number) > 0:
        if kind == "mla":
            return Arm(name, rank=int(number))
        groups = int(number)
        if not 1 < groups < sizes.num_heads or sizes.num_heads % groups:
            raise RequestError(
                f"--arms: {name} does not divide {sizes.num_heads} heads; gqa-1 is called mqa, "
                f"gqa-{sizes.num_heads} is called mha."
            )
        return Arm(name, num_kv_heads=groups)
    raise RequestError(f"--arms: {name!r} is not known; write mha, mqa, gqa-GROUPS or mla-RANK, such as gqa-2,mla-56.")


def default_arms(sizes: Sizes) -> tuple[str, ...]:
    """MHA, GQA with a quarter of the heads, MQA, and MLA with the cache of each of the two and with 1/16 of MHA's.

    What the sizes do not allow is left out.
    """
    groups = sizes.num_heads // 4
    gqa = [f"gqa-{groups}"] if groups > 1 and sizes.num_heads % groups == 0 else []
    per_head = 2 * sizes.head_dim
    caches = [groups * per_head] if gqa else []
    caches += [per_head, sizes.num_heads * per_head // 16]
    ranks = [cache - sizes.rope_dim for cache in dict.fromkeys(caches)]
    mqa = ["mqa"] if sizes.num_heads > 1 else []
    return (BASELINE, *gqa, *mqa, *(f"mla-{rank}" for rank in ranks if rank >= _LEAST_RANK))


def matched_width(arm: Arm, sizes: Sizes) -> int:
    """The width of the feed-forward layer that brings the arm's parameters nearest to those of MHA.

    Raises:
        RequestError: the attention alone has more parameters than all of MHA.
    """
    wanted = count_parameters(parse_arm(BASELINE, sizes).config(sizes, sizes.mha_width))
    least = count_parameters(arm.config(sizes, WIDTH_STEP))
    per_step = count_parameters(arm.config(sizes, 2 * WIDTH_STEP)) - least
    width = WIDTH_STEP * (1 + round((wanted - least) / per_step))
    if width < WIDTH_STEP:
        raise RequestError(
            f"{arm.name} has more parameters than MHA even without a feed-forward layer: choose a smaller rank, or "
            "--match none."
        )
    return width
