"""The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): which tokens each token reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentkv import ops
from latentkv.errors import CacheError
from latentkv.models.batch import Batch
from latentkv.models.config import IndexerConfig
from latentkv.models.layers import Linear
from latentkv.models.packing import Packer
from latentkv.models.rope import Rotary
from latentkv.state import LayerState


class HeadWeights(nn.Linear):
    """What each head's scores count for each token, in float32 whatever the model's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """[T, hidden] -> [T, H] float32 (float64 for float64 weights)."""
        return ops.weigh_heads(input, self.weight, self.out_features**-0.5)

    def pack(self, packer: Packer) -> None:
        """See `Packable`; the weights stay as they are, dequantised where a checkpoint holds them quantised."""
        self.weight = nn.Parameter(packer.plain("weight").to(self.weight.dtype), requires_grad=False)


class Indexer(nn.Module):
    """Scores every token against those that it sees, in a few small heads that share one key a token.

    Args:
        hidden_size: width of the residual stream.
        q_lora_rank: of the latent that the layer's queries come from, and these.
        rope_dim: R; the first R dimensions of queries and keys are rotated, by the layer's own angles.
        config: sizes.

    Attributes:
        topk: how many tokens each token reads.
    """

    def __init__(self, hidden_size: int, q_lora_rank: int, rope_dim: int, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.topk = config.topk
        self.rope_dim = rope_dim
        self.wq_b = Linear(q_lora_rank, config.num_heads * config.head_dim, bias=False)
        self.wk = Linear(hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.weights_proj = HeadWeights(hidden_size, config.num_heads, bias=False)

    @torch.no_grad()
    def select_slots(
        self, x: Tensor, compressed: Tensor, positions: Rotary, batch: Batch, state: LayerState
    ) -> Tensor | None:
        """Write the new tokens' keys into the cache, then select among all that are cached.

        Args:
            x: [T, hidden], the layer's input, normed.
            compressed: [T, q_lora_rank], the normed latent of its queries.
            positions: rotary angles of the T tokens.
            batch: where they belong.
            state: the layer's.

        Returns:
            [T, topk] int32 as `ops.select_slots` gives it; None where every token reads all that it sees.

        Raises:
            CacheError: the cache keeps no keys for this layer.
        """
        if state.index_keys is None:
            raise CacheError("sparse attention needs a cache with index keys: make it of ModelConfig.specs")
        ops.write_index_keys(
            state.index_keys,
            batch.slots,
            self.wk(x),
            self.k_norm.weight,
            self.k_norm.bias,
            self.k_norm.eps,
            positions.cos,
            positions.sin,
            interleaved=self.config.interleaved,
        )
        if max(batch.kv_lens) - batch.kv_start <= self.topk:
            return None
        q = self._queries(compressed)
        turned, cos, sin = q[..., : self.rope_dim], positions.cos.unsqueeze(1), positions.sin.unsqueeze(1)
        ops.apply_rope(turned, cos, sin, interleaved=self.config.interleaved, out=turned)
        return ops.select_slots(
            q,
            self.weights_proj(x),
            state.index_keys,
            batch.block_table,
            batch.q_start,
            batch.stop,
            topk=self.topk,
            start=batch.start,
        )

    @torch.no_grad()
    def select_tokens(self, x: Tensor, compressed: Tensor, positions: Rotary) -> Tensor | None:
        """Which tokens each token of whole sequences reads; not differentiable.

        Args:
            x: [B, S, hidden], the layer's input, normed.
            compressed: [B, S, q_lora_rank], the normed latent of its queries.
            positions: rotary angles, [1 or B, S, R/2].

        Returns:
            [B, S, S] bool; None where every token reads all that it sees.
        """
        length = x.shape[1]
        if length <= self.topk:
            return None
        cos, sin, interleaved = positions.cos, positions.sin, self.config.interleaved
        q = ops.rotate_first(self._queries(compressed), cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)
        keys = ops.rotate_first(self.k_norm(self.wk(x)), cos, sin, interleaved)
        weights = self.weights_proj(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        scores = [ops.index_scores(*row, range(1, length + 1)) for row in zip(q, weights, keys, strict=True)]
        return ops.best_tokens(torch.stack(scores), self.topk).tril()

    def _queries(self, compressed: Tensor) -> Tensor:
        """[..., q_lora_rank] -> [..., H, D], not yet rotated."""
        q = self.wq_b(compressed)
        return q.view(*q.shape[:-1], self.config.num_heads, -1)
