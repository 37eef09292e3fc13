"""Grouped-query attention (arXiv 2305.13245): MHA, GQA and MQA, what MLA is compared with and converted from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv import ops
from latentkv.models.batch import Batch
from latentkv.models.config import GQAConfig, RopeConfig
from latentkv.models.forms import Form
from latentkv.models.layers import Linear, RMSNorm
from latentkv.models.rope import Rotary
from latentkv.state import LayerState


class GroupedQueryAttention(nn.Module):
    """One layer of attention whose G key/value heads each serve H / G query heads.

    Args:
        hidden_size: width of the residual stream.
        num_heads: H.
        config: key/value heads, head width, biases, norms on queries and keys.
        rope: rotary embedding of a head's first dimensions, or all of them.
        norm_eps: epsilon of the query and key norms.
        sliding_window: a token sees at most this many tokens, itself included; None: all.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: GQAConfig,
        rope: RopeConfig,
        *,
        norm_eps: float = 1e-6,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rope = rope
        self.num_heads = num_heads
        self.sliding_window = sliding_window
        self.scale = config.score_scale
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden_size, num_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(num_heads * config.head_dim, hidden_size, bias=config.output_bias)
        if config.qk_norm:
            heads = (1, 1) if config.qk_norm_per_head else (num_heads, config.num_kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(count * config.head_dim, norm_eps) for count in heads)

    def forward(self, x: Tensor, positions: Rotary) -> Tensor:
        """Causal attention over whole sequences, without a cache: [B, S, hidden] -> [B, S, hidden]."""
        q, k, v = (tensor.transpose(1, 2) for tensor in self.project(x, positions))
        mask = None if self.sliding_window is None else _window_mask(x.shape[1], self.sliding_window, x.device)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def attend(
        self,
        x: Tensor,
        positions: Rotary,
        batch: Batch,
        state: LayerState,
        residual: Tensor | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """Write the new tokens' keys and values into the cache, then attend to everything cached.

        Args:
            x: [T, hidden], the new tokens of all sequences, ragged.
            positions: rotary angles of the T tokens.
            batch: where they belong.
            state: this layer's keys and values, pages [N, P, 2, G, D].
            residual: [T, hidden] that the result is added to.
            form: of latent attention; this one has no other.

        Returns:
            [T, hidden].
        """
        q, k, v = self.project(x, positions)
        # A key and its value lie beside each other, as a latent and its rotated key do.
        ops.write_latents(state.pages.flatten(2), batch.slots, k.flatten(-2), v.flatten(-2))
        start = batch.start
        if self.sliding_window is not None:
            start = (batch.stop - self.sliding_window).clamp(min=batch.kv_start)
        out, _ = ops.gqa_attend(
            q, state.pages, batch.block_table, batch.q_start, batch.stop, scale=self.scale, start=start
        )
        return self.o_proj(out.flatten(-2), residual)

    def project(self, x: Tensor, positions: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [..., H, D] and k [..., G, D], and v [..., G, D]."""
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_norm and not config.qk_norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (tensor.unflatten(-1, (-1, config.head_dim)) for tensor in (q, k, v))
        if config.qk_norm and config.qk_norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _rotate(self, heads: Tensor, positions: Rotary) -> Tensor:
        """The first `rope.dim` of the dimensions [..., D] rotated: in place, if that is not all of them."""
        turned = heads[..., : self.rope.dim]
        cos, sin = positions.cos[..., None, :], positions.sin[..., None, :]
        if turned.shape == heads.shape:
            return ops.apply_rope(heads, cos, sin, interleaved=self.rope.interleaved)
        ops.apply_rope(turned, cos, sin, interleaved=self.rope.interleaved, out=turned)
        return heads


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S] True where a row may look: itself and the window - 1 tokens before it."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    return (distance >= 0) & (distance < window)
