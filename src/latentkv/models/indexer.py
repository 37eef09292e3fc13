"""The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): which tokens each token reads.

That of GLM-5.3-Flash selects pools of tokens, which have one key each.
"""

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
        rope_dim: R; the first or last R dimensions of queries and keys are rotated, by the layer's own angles.
        config: sizes.
    """

    def __init__(self, hidden_size: int, q_lora_rank: int, rope_dim: int, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_dim = rope_dim
        self.wq_b = Linear(q_lora_rank, config.num_heads * config.head_dim, bias=False)
        self.wk = Linear(hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.weights_proj = HeadWeights(hidden_size, config.num_heads, bias=False)
        if config.pool is not None:
            self.index_kpool_compress_gate = Linear(hidden_size, config.head_dim, bias=False)
            self.index_kpool_compress_ape = nn.Parameter(torch.zeros(config.pool, config.head_dim))

    def keep_exact(self) -> None:
        """Hold in float32 after a cast what pools are weighted by, and the norm of keys where it is trained so."""
        if self.config.exact_norm:
            self.k_norm.float()
        if self.config.pool is not None:
            ape = self.index_kpool_compress_ape
            self.index_kpool_compress_ape = nn.Parameter(ape.detach().float(), ape.requires_grad)

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
            [T, most that is read] int32 as `ops.select_slots` gives it; None where every token reads all that it sees.

        Raises:
            CacheError: the cache keeps no keys for this layer.
        """
        if state.index_keys is None:
            raise CacheError("sparse attention needs a cache with index keys: make it of ModelConfig.specs")
        config = self.config
        self._write_keys(x, positions, batch, state.index_keys, state.rings)
        if max(batch.kv_lens) - batch.kv_start <= config.all_read:
            return None
        q = self._queries(compressed)
        if self.rope_dim:
            turned, cos, sin = q[..., : self.rope_dim], positions.cos.unsqueeze(1), positions.sin.unsqueeze(1)
            ops.apply_rope(turned, cos, sin, interleaved=config.interleaved, out=turned)
        return ops.select_slots(
            q,
            self.weights_proj(x),
            state.index_keys,
            batch.block_table,
            batch.q_start,
            batch.stop,
            topk=config.topk,
            start=batch.start,
            pool=config.pool or 1,
            open_pool=config.open_pool,
        )

    def _write_keys(self, x: Tensor, positions: Rotary, batch: Batch, keys: Tensor, rings: Tensor | None) -> None:
        norm = self._rotated_first(self.k_norm.weight), self._rotated_first(self.k_norm.bias), self.k_norm.eps
        if self.config.pool is None:
            k, angles = self._rotated_first(self.wk(x)), (positions.cos, positions.sin)
            ops.write_index_keys(keys, batch.slots, k, *norm, *angles, interleaved=self.config.interleaved)
            return
        if rings is None:
            raise CacheError("pools of tokens need a cache with rings: make it of ModelConfig.specs")
        gate = self.index_kpool_compress_gate(x)
        ops.write_pooled_keys(keys, rings, batch.slots, self.wk(x), gate, *norm, self.index_kpool_compress_ape)

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
        length, config = x.shape[1], self.config
        if length <= config.all_read:
            return None
        cos, sin = positions.cos, positions.sin
        q = ops.rotate_first(self._queries(compressed), cos.unsqueeze(-2), sin.unsqueeze(-2), config.interleaved)
        keys = self.wk(x)
        normed = self.k_norm(keys.to(self.k_norm.weight.dtype)).to(keys.dtype)
        keys = ops.rotate_first(self._rotated_first(normed), cos, sin, config.interleaved)
        pool = config.pool or 1
        if config.pool is not None:
            wide, whole = torch.promote_types(x.dtype, torch.float32), length // pool * pool
            gates = self.index_kpool_compress_gate(x)
            keys, gates = (t[:, :whole].unflatten(1, (-1, pool)).to(wide) for t in (keys, gates))
            keys = ops.pool_keys(keys, gates, self.index_kpool_compress_ape)
        weights = self.weights_proj(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        ends = [(t + 1) // pool for t in range(length)]
        scores = [ops.index_scores(*row, ends) for row in zip(q, weights, keys, strict=True)]
        best = ops.best_tokens(torch.stack(scores), min(config.topk // pool, keys.shape[1]))
        return best.tril() if pool == 1 else self._tokens_of(best, pool, length)

    def _tokens_of(self, best: Tensor, pool: int, length: int) -> Tensor:
        """The tokens [B, S, S] of the best pools [B, S, S // pool], and those after the pools that a token sees."""
        tokens = torch.arange(length, device=best.device)
        stop = (tokens[:, None] + 1) // pool * pool
        selected = nn.functional.pad(best.repeat_interleave(pool, dim=-1), (0, length - best.shape[-1] * pool))
        selected &= tokens < stop
        return selected | ((tokens >= stop) & (tokens <= tokens[:, None])) if self.config.open_pool else selected

    def _queries(self, compressed: Tensor) -> Tensor:
        """[..., q_lora_rank] -> [..., H, D], not yet rotated."""
        q = self.wq_b(compressed)
        return self._rotated_first(q.view(*q.shape[:-1], self.config.num_heads, -1))

    def _rotated_first(self, x: Tensor) -> Tensor:
        """Of x [..., D] the dimensions that are rotated, then the others: products do not depend on their order."""
        return x.roll(self.rope_dim, -1) if self.config.rotates_last else x
