"""The attention layers that are measured, and the arithmetic of one decode step of each form, counted by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentkv.models.config import LayerConfig, MLAConfig, ModelConfig, RopeConfig
from latentkv.plan import Plan, make_plan
from latentkv.state.spec import KVFormat

StepForm = Literal["absorbed", "re-expanded", "expanded cache"]


@dataclass(frozen=True)
class AttentionShape:
    """One latent-attention layer: `num_heads` H of `mla` (L, R, Dn, Dv) on a residual stream of `hidden_size`."""

    hidden_size: int
    num_heads: int
    mla: MLAConfig

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shape [out, in] (norms: [dim]) of each weight, by its Hugging Face name."""
        mla, heads = self.mla, self.num_heads
        q_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            query: dict[str, tuple[int, ...]] = {"q_proj.weight": (q_width, self.hidden_size)}
        else:
            query = {
                "q_a_proj.weight": (mla.q_lora_rank, self.hidden_size),
                "q_a_layernorm.weight": (mla.q_lora_rank,),
                "q_b_proj.weight": (q_width, mla.q_lora_rank),
            }
        return query | {
            "kv_a_proj_with_mqa.weight": (mla.kv_lora_rank + mla.qk_rope_head_dim, self.hidden_size),
            "kv_a_layernorm.weight": (mla.kv_lora_rank,),
            "kv_b_proj.weight": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
            "o_proj.weight": (self.hidden_size, heads * mla.v_head_dim),
        }

    def step_flops(self, form: StepForm, context: int) -> int:
        """FLOPs of the matrix products of one decode step; a multiply-add is two, norms, softmax and rope are left out.

        All forms: 2 a weight of q, kv_a and o. Then, a head:
        absorbed: 2 L (Dn + Dv) once + 2 (2 L + R) a cached token;
        re-expanded: 2 L (Dn + Dv) + 2 (Dn + R + Dv) a cached token, as the latents are expanded again at every step;
        expanded cache: 2 L (Dn + Dv) once, for the new token, + 2 (Dn + R + Dv) a cached token.

        Args:
            form: how the step attends.
            context: tokens attended to, the new one included.
        """
        mla = self.mla
        shared = sum(math.prod(s) for name, s in self.weights().items() if len(s) == 2 and name != "kv_b_proj.weight")
        up = self.num_heads * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
        expanded_pair = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
        pair = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim if form == "absorbed" else expanded_pair
        return 2 * (shared + up * (context if form == "re-expanded" else 1) + self.num_heads * pair * context)

    def plan(self, context: int, kv_format: KVFormat) -> Plan:
        """What `latentkv plan` says of a model of this one layer."""
        config = ModelConfig(
            model_type="deepseek_v2",
            vocab_size=1,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            intermediate_size=1,
            max_positions=context,
            layers=(LayerConfig(self.mla, RopeConfig(dim=self.mla.qk_rope_head_dim, interleaved=True)),),
        )
        return make_plan("one layer", config, memory=(), context=context, kv_dtype=kv_format)


SHAPES: Mapping[str, AttentionShape] = {
    "v2-lite": AttentionShape(2048, 16, MLAConfig(512, 128, 64, 128)),
    "v3": AttentionShape(7168, 128, MLAConfig(512, 128, 64, 128, q_lora_rank=1536)),
}
"""Published layers: DeepSeek-V2-Lite (arXiv 2405.04434, appendix B), DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""
