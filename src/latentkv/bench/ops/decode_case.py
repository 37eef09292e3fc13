"""One decode step for several implementations: random weights, a cached past, a new token, the true answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv import ops
from latentkv.bench.shapes import AttentionShape
from latentkv.models.config import RopeConfig
from latentkv.models.rope import Rotary, rotary

NORM_EPS = 1e-6


@dataclass(frozen=True)
class DecodeCase:
    """What every contender is given. Batch 1; the new token is the last of `context`.

    Attributes:
        shape: the layer.
        context: tokens attended to, the new one included.
        weights: bf16, by Hugging Face name.
        latents: [context - 1, L] bf16, the normed latents of the past.
        k_rope: [context - 1, R] bf16, their rotated keys.
        x: [1, hidden] bf16, the new token.
        positions: its rotary angles.
    """

    shape: AttentionShape
    context: int
    weights: dict[str, Tensor]
    latents: Tensor
    k_rope: Tensor
    x: Tensor
    positions: Rotary

    @classmethod
    def random(cls, shape: AttentionShape, context: int, *, seed: int = 0) -> DecodeCase:
        """Weights of unit gain, the query's twice that: scores spread enough for a wrong key to show in the output."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        weights: dict[str, Tensor] = {}
        for name, size in shape.weights().items():
            gain = 2.0 if name in ("q_proj.weight", "q_b_proj.weight") else 1.0
            drawn = 1 + 0.1 * randn(*size) if len(size) == 1 else randn(*size) * gain * size[1] ** -0.5
            weights[name] = drawn.bfloat16()
        return cls(
            shape,
            context,
            weights,
            latents=randn(context - 1, shape.mla.kv_lora_rank).bfloat16(),
            k_rope=randn(context - 1, shape.mla.qk_rope_head_dim).bfloat16(),
            x=randn(1, shape.hidden_size).bfloat16(),
            positions=rotary(rope_of(shape), torch.tensor([context - 1]), max_context=context),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer's weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def scale(self) -> float:
        """Softmax scale, (Dn + R)^-1/2."""
        return (self.shape.mla.qk_nope_head_dim + self.shape.mla.qk_rope_head_dim) ** -0.5

    def queries(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """q_nope [1, H, Dn] and rotated q_rope [1, H, R] of the new token, computed in `dtype`."""
        x, mla = self.x.to(dtype), self.shape.mla
        if mla.q_lora_rank is None:
            q = x @ self._weight("q_proj", dtype).T
        else:
            low = ops.rms_norm(x @ self._weight("q_a_proj", dtype).T, self._weight("q_a_layernorm", dtype), NORM_EPS)
            q = low @ self._weight("q_b_proj", dtype).T
        q_nope, q_rope = q.unflatten(-1, (self.shape.num_heads, -1)).split(
            [mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1
        )
        cos, sin = self.positions.cos[:, None], self.positions.sin[:, None]
        return q_nope, ops.apply_rope(q_rope, cos, sin, interleaved=True)

    def new_latents(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """Latent [1, L] and rotated key [1, R] of the new token, computed in `dtype`."""
        joined = self.x.to(dtype) @ self._weight("kv_a_proj_with_mqa", dtype).T
        latent, k_rope = joined.split([self.shape.mla.kv_lora_rank, self.shape.mla.qk_rope_head_dim], dim=-1)
        k_rope = ops.apply_rope(k_rope, self.positions.cos, self.positions.sin, interleaved=True)
        return ops.rms_norm(latent, self._weight("kv_a_layernorm", dtype), NORM_EPS), k_rope

    def expected(self) -> Tensor:
        """The layer's output [1, hidden] in float64, head by head."""
        dtype, mla = torch.float64, self.shape.mla
        q_nope, q_rope = self.queries(dtype)
        latent, k_rope = self.new_latents(dtype)
        latents, keys_rope = torch.cat([self.latents, latent]), torch.cat([self.k_rope, k_rope])
        up = self._weight("kv_b_proj", dtype).unflatten(0, (self.shape.num_heads, -1))
        heads: list[Tensor] = []
        for head in range(self.shape.num_heads):
            w_uk, w_uv = up[head].split([mla.qk_nope_head_dim, mla.v_head_dim])
            # (W_UK c) . q is computed as c . (W_UK^T q), which needs no expanded keys.
            scores = latents @ (w_uk.T @ q_nope[0, head]) + keys_rope @ q_rope[0, head]
            heads.append(w_uv @ (latents.T @ (scores * self.scale).softmax(0)))
        return (torch.cat(heads) @ self._weight("o_proj", dtype).T)[None]

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[f"{name}.weight"].to(dtype)


def rope_of(shape: AttentionShape) -> RopeConfig:
    """Plain interleaved rotary embedding, as DeepSeek has it (YaRN only changes the angles, which are given)."""
    return RopeConfig(dim=shape.mla.qk_rope_head_dim, interleaved=True)
