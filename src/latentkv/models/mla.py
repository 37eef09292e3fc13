"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in both of its forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from latentkv import ops
from latentkv.errors import ConfigError
from latentkv.models.batch import Batch
from latentkv.models.config import IndexerConfig, MLAConfig, RopeConfig
from latentkv.models.forms import Form, choose_form
from latentkv.models.indexer import Indexer
from latentkv.models.layers import Linear, RMSNorm
from latentkv.models.packing import Packer
from latentkv.models.rope import Rotary, rotary
from latentkv.state import LayerState
from latentkv.weights import PackedWeight


class _Kind(NamedTuple):
    """How a sequence is attended: in which form, in int8 products or not, and whether to selected tokens alone."""

    form: Form
    int8_products: bool
    sparse: bool


class MultiHeadLatentAttention(nn.Module):
    """One layer of latent attention; its cache holds `[c ; k_rope]`, L + R numbers a token; an indexer adds a key.

    Usable alone: `forward` runs whole sequences (differentiable), `attend` runs new tokens over a paged cache.

    Args:
        hidden_size: width of the residual stream.
        num_heads: H.
        kv_lora_rank: L, the rank of the latent that is cached.
        qk_nope_head_dim: Dn, dimensions of each query/key head without position.
        qk_rope_head_dim: R, rotary dimensions of each query head and of the one shared key.
        v_head_dim: Dv, dimensions of each value head.
        q_lora_rank: rank of the query's own bottleneck, or None for a full projection.
        rope: rotary embedding of R dimensions; None: plain, theta 10000.
        bias: on q_a_proj, kv_a_proj_with_mqa and o_proj.
        norm_eps: epsilon of the two latent norms.
        max_context: longest sequence (only longrope depends on it); None: the rope's original length.
        indexer: what selects the tokens that each token reads, which takes a q_lora_rank; None: it reads all.
        shares_selection: the layer has no indexer, and reads what the last one before it has selected.
        output_gate: what the heads give is multiplied by a sigmoid, see `MLAConfig`.
        q_lora_scale: what queries are multiplied by.
        kv_lora_scale: what the normed latent is multiplied by before it is cached.
        sinks: each head has a learned number in the sum that its softmax divides by, see `ops.sink_heads`.

    Attributes:
        int8_products: whether steps of one token a sequence multiply bytes over an int8 cache, see `ops.mla_attend`.
    """

    int8_products: bool = False

    absorb_key: PackedWeight | None = None
    absorb_value: PackedWeight | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope: RopeConfig | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
        max_context: int | None = None,
        indexer: IndexerConfig | None = None,
        shares_selection: bool = False,
        output_gate: Literal["head", "element", "with queries"] | None = None,
        q_lora_scale: float = 1.0,
        kv_lora_scale: float = 1.0,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.rope = rope or RopeConfig(dim=qk_rope_head_dim, interleaved=True)
        if self.rope.dim != qk_rope_head_dim:
            raise ConfigError(
                f"rope has {self.rope.dim} dimensions, qk_rope_head_dim is {qk_rope_head_dim}; make them equal."
            )
        self.config = MLAConfig(
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            q_lora_rank,
            norm_eps,
            bias,
            output_gate,
            q_lora_scale,
            kv_lora_scale,
            sinks,
        )
        self.num_heads = num_heads
        self.kv_lora_scale = kv_lora_scale
        self.max_context = max_context or self.rope.original_max_positions
        # Queries are multiplied by keys alone: what scales all of a query scales the softmax, and is rounded nowhere.
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * self.rope.softmax_factor * q_lora_scale
        # Cached tokens expanded at a time: bounds memory, whatever the context.
        self.expand_chunk = 4096
        self.gates_with_queries = output_gate == "with queries"
        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim + (v_head_dim if self.gates_with_queries else 0))
        if self.gates_with_queries and q_lora_rank is None:
            raise ConfigError("a gate is projected with the queries from their latent: give a q_lora_rank.")
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, norm_eps)
            self.q_b_proj = Linear(q_lora_rank * (2 if self.gates_with_queries else 1), q_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        if output_gate is not None and not self.gates_with_queries:
            gates = num_heads if output_gate == "head" else num_heads * v_head_dim
            self.g_proj = Linear(hidden_size, gates, bias=False)
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.is_sparse = indexer is not None
        # Of so many tokens or fewer a sparse layer reads all that it sees.
        self.all_read = 0 if indexer is None else indexer.all_read
        self.indexer = None
        if indexer is not None and not shares_selection:
            if q_lora_rank is None:
                raise ConfigError("an indexer's queries come from the latent of the queries: give a q_lora_rank.")
            self.indexer = Indexer(hidden_size, q_lora_rank, qk_rope_head_dim, indexer)

    def forward(self, x: Tensor, positions: Rotary | None = None, *, form: Form = "expanded") -> Tensor:
        """Causal attention over whole sequences, without a cache.

        Args:
            x: [B, S, hidden].
            positions: rotary angles of the S tokens, [1 or B, S, R/2]; None: positions 0 .. S-1.
            form: "expanded" (ordinary heads; the cheaper one to train) or "absorbed" (attention on the latents).

        Returns:
            [B, S, hidden].
        """
        if positions is None:
            tokens = torch.arange(x.shape[1], device=x.device)[None]
            positions = rotary(self.rope, tokens, max_context=self.max_context)
        compressed = self._compress_queries(x)
        q_nope, q_rope, gate = self._project_queries(x, compressed, positions)
        q_rope = self._rotate(q_rope, positions)
        latent, k_rope = self._latents(x, positions)
        if self.indexer is not None:
            positions.selection.tokens = self.indexer.select_tokens(x, self._normed(compressed), positions)
        selected = positions.selection.tokens if self.is_sparse else None
        if form == "absorbed":
            q = self._absorb(q_nope.flatten(0, 1), q_rope.flatten(0, 1)).unflatten(0, x.shape[:2])
            keys = torch.cat([latent, k_rope], dim=-1)[:, :, None].expand(-1, -1, self.num_heads, -1)
            values = latent[:, :, None].expand(-1, -1, self.num_heads, -1)
            attended = ops.causal_attention(q, keys, values, scale=self.scale, selected=selected, sinks=self.sinks)
            return self._output(gate, self._unabsorb(attended.flatten(0, 1)).unflatten(0, x.shape[:2]))
        k_nope, values = self._expand(latent)
        keys = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, self.num_heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        attended = ops.causal_attention(q, keys, values, scale=self.scale, selected=selected, sinks=self.sinks)
        return self._output(gate, attended)

    def attend(
        self,
        x: Tensor,
        positions: Rotary,
        batch: Batch,
        state: LayerState,
        residual: Tensor | None = None,
        form: Form | None = None,
    ) -> Tensor:
        """Write the new tokens' latents into the cache, then attend to everything cached, or to what is selected of it.

        Args:
            x: [T, hidden], the new tokens of all sequences, ragged.
            positions: rotary angles of the T tokens.
            batch: where they belong.
            state: this layer's latents and index keys.
            residual: [T, hidden] that the result is added to.
            form: None: `choose_form` decides for each sequence; selected tokens are read in the absorbed form.

        Returns:
            [T, hidden].
        """
        compressed = self._compress_queries(x)
        q_nope, q_rope, gate = self._project_queries(x, compressed, positions)
        ops.norm_rope_write(
            state.pages,
            batch.slots,
            self.kv_a_proj_with_mqa(x),
            self._latent_weight(),
            self.kv_a_layernorm.eps,
            positions.cos,
            positions.sin,
            interleaved=self.rope.interleaved,
            kv_format=state.kv_format,
        )
        if self.indexer is not None:
            positions.selection.tokens = self.indexer.select_slots(x, self._normed(compressed), positions, batch, state)
        slots = positions.selection.tokens if self.is_sparse else None
        pieces = batch if slots is None else batch.cut(batch.kv_start + self.all_read)
        kinds = self._kinds(form, slots, batch, pieces)
        if len({(kind.form, kind.int8_products) for kind in kinds}) == 1 and kinds[0].form == "absorbed":
            q = self._absorb_and_rotate(q_nope, q_rope, positions)
            return self._output(gate, self._attend_absorbed(q, batch, state, kinds[0], slots), residual)
        q_rope = self._rotate(q_rope, positions)
        outputs: list[Tensor] = []
        for first, last in runs(kinds):
            if kinds[first].form == "absorbed":
                part, rows = pieces.part(first, last)
                q = self._absorb(q_nope[rows], q_rope[rows])
                own = slots[rows] if slots is not None and kinds[first].sparse else None
                outputs.append(self._attend_absorbed(q, part, state, kinds[first], own))
                continue
            for row in range(first, last):
                one, rows = pieces.part(row, row + 1)
                outputs.append(self._attend_expanded(q_nope[rows], q_rope[rows], one, state))
        return self._output(gate, torch.cat(outputs), residual)

    def pack(self, packer: Packer) -> None:
        """See `Packable`: W_UK and W_UV a head, beside kv_b_proj, which expands; a scale in the weight of a norm."""
        if self.kv_lora_scale != 1.0:
            self.kv_a_layernorm.weight = nn.Parameter(self._latent_weight().detach(), requires_grad=False)
            self.kv_lora_scale = 1.0
        w_uk, w_uv = self._split_up_projection(packer.plain("kv_b_proj.weight"))
        self.absorb_key = packer.pack("absorb_key", w_uk.transpose(1, 2))
        self.absorb_value = packer.pack("absorb_value", w_uv)

    def _kinds(self, form: Form | None, slots: Tensor | None, batch: Batch, pieces: Batch) -> list[_Kind]:
        """How to attend each of the pieces that a batch is cut into where tokens begin to be selected."""
        # Int8 products are for decoding only: else a prompt's numbers would change with where it is cut.
        decoded = {row for row, new in zip(accumulate(batch.query_lens), batch.query_lens, strict=True) if new == 1}
        kinds: list[_Kind] = []
        rows = accumulate(pieces.query_lens)
        for row, new, end in zip(rows, pieces.query_lens, pieces.kv_lens, strict=True):
            sparse = slots is not None and end - pieces.kv_start > self.all_read
            chosen: Form = "absorbed" if sparse else form or choose_form(self.config, new, end)
            kinds.append(_Kind(chosen, self.int8_products and new == 1 and row in decoded, sparse))
        return kinds

    def _compress_queries(self, x: Tensor) -> Tensor:
        """What queries are projected from: the normed latent [..., q_lora_rank], or x itself where they have none.

        Where their gate is projected with them, the latent itself stands beside the normed one.
        """
        if self.config.q_lora_rank is None:
            return x
        latent = self.q_a_proj(x)
        if self.gates_with_queries:
            return ops.norm_beside(latent, self.q_a_layernorm.weight, self.q_a_layernorm.eps)
        return self.q_a_layernorm(latent)

    def _normed(self, compressed: Tensor) -> Tensor:
        """The normed latent alone."""
        return compressed[..., : self.config.q_lora_rank] if self.gates_with_queries else compressed

    def _project_queries(
        self, x: Tensor, compressed: Tensor, positions: Rotary
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q_nope [..., H, Dn], q_rope [..., H, R], not yet rotated, and what the output's gate is the sigmoid of."""
        q = (self.q_proj if self.config.q_lora_rank is None else self.q_b_proj)(compressed)
        q = q.view(*q.shape[:-1], self.num_heads, -1)
        gate = None
        # Slices and unsqueeze rather than split and unflatten: a decode step is many small calls.
        nope, width = self.config.qk_nope_head_dim, self.config.qk_nope_head_dim + self.config.qk_rope_head_dim
        if self.gates_with_queries:
            q, gate = q[..., :width], q[..., width:]
        elif self.config.output_gate is not None:
            gate = self.g_proj(x)
        if positions.query_scale is not None:
            q = q * positions.query_scale[..., None, None].to(q.dtype)
        return q[..., :nope], q[..., nope:], gate

    def _rotate(self, q_rope: Tensor, positions: Rotary, out: Tensor | None = None) -> Tensor:
        if not self.rope.dim:
            return q_rope if out is None else out
        cos, sin = positions.cos.unsqueeze(-2), positions.sin.unsqueeze(-2)
        return ops.apply_rope(q_rope, cos, sin, interleaved=self.rope.interleaved, out=out)

    def _latents(self, x: Tensor, positions: Rotary) -> tuple[Tensor, Tensor]:
        """What is cached: normed latent c [..., L] and rotated shared key [..., R]."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        k_rope = ops.apply_rope(k_rope, positions.cos, positions.sin, interleaved=self.rope.interleaved)
        if self.kv_lora_scale == 1.0:
            return self.kv_a_layernorm(latent), k_rope  # which healing takes into the projection
        return ops.rms_norm(latent, self._latent_weight(), self.kv_a_layernorm.eps), k_rope

    def _latent_weight(self) -> Tensor:
        """What latents are multiplied by once they are normed, [L].

        A scale is a factor of it, in float32: a bfloat16 weight would be rounded once more, the latents are rounded but
        once. The shared key beside them is not scaled, so neither softmax nor kv_b_proj could take the scale over.
        """
        weight = self.kv_a_layernorm.weight
        if self.kv_lora_scale == 1.0:
            return weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) * self.kv_lora_scale

    def _split_up_projection(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W_UK [H, Dn, L] and W_UV [H, Dv, L], views of kv_b_proj's weight."""
        w_uk, w_uv = weight.unflatten(0, (self.num_heads, -1)).split(
            [self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1
        )
        return w_uk, w_uv

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """[W_UK^T q_nope ; q_rope]: [T, H, Dn] and rotated [T, H, R] -> [T, H, L + R]."""
        if self.absorb_key is None:
            w_uk, _ = self._split_up_projection(self.kv_b_proj.weight)
            absorbed = torch.einsum("...hn,hnl->...hl", q_nope, w_uk)
        else:
            absorbed = ops.headwise_linear(q_nope, self.absorb_key)
        return torch.cat([absorbed, q_rope], dim=-1)

    def _absorb_and_rotate(self, q_nope: Tensor, q_rope: Tensor, positions: Rotary) -> Tensor:
        """The same of a q_rope that is still to be rotated; packed, both are written where they belong."""
        if self.absorb_key is None:
            return self._absorb(q_nope, self._rotate(q_rope, positions))
        rank = self.config.kv_lora_rank
        q = q_nope.new_empty(*q_nope.shape[:-1], rank + q_rope.shape[-1])
        ops.headwise_linear(q_nope, self.absorb_key, out=q[..., :rank])
        self._rotate(q_rope, positions, out=q[..., rank:])
        return q

    def _unabsorb(self, attended: Tensor) -> Tensor:
        """W_UV (sum of latents): [T, H, L] -> [T, H, Dv]."""
        if self.absorb_value is None:
            _, w_uv = self._split_up_projection(self.kv_b_proj.weight)
            return torch.einsum("...hl,hvl->...hv", attended, w_uv)
        return ops.headwise_linear(attended, self.absorb_value)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without position [..., H, Dn] and values [..., H, Dv] of latents [..., L]."""
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, values = expanded.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        return k_nope, values

    def _output(self, gate: Tensor | None, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        if gate is not None:
            heads = ops.gate_heads(heads, gate)
        return self.o_proj(heads.flatten(-2), residual)

    def _attend_absorbed(self, q: Tensor, batch: Batch, state: LayerState, kind: _Kind, slots: Tensor | None) -> Tensor:
        attended, lse = ops.mla_attend(
            q,
            state.pages,
            batch.block_table,
            batch.q_start,
            batch.stop,
            latent_dim=self.config.kv_lora_rank,
            scale=self.scale,
            kv_format=state.kv_format,
            start=batch.start,
            slots=slots,
            only_longer_ranges=slots is not None and self.all_read > 0,
            int8_products=kind.int8_products,
        )
        return self._sink(self._unabsorb(attended), lse)

    def _attend_expanded(self, q_nope: Tensor, q_rope: Tensor, batch: Batch, state: LayerState) -> Tensor:
        """One sequence in expanded form: the cache is expanded a chunk at a time, the parts merged by log-sum-exp.

        Keys and values come from the cache for the new tokens too, so that a prompt gives the same result whether it
        is prefilled in one piece or in several, whatever the cache's format.
        """
        q = torch.cat([q_nope, q_rope], dim=-1)
        total = batch.kv_lens[0]
        past = total - batch.query_lens[0]
        parts: Iterator[tuple[slice, tuple[Tensor, Tensor]]] = (
            self._attend_chunk(q, batch.block_table[0], state, begin, end, past)
            for begin, end in chunk_bounds(batch.kv_start, past, total, self.expand_chunk)
        )
        _, (out, lse) = next(parts)  # every row sees something of the first chunk
        for rows, part in parts:
            out[rows], lse[rows] = ops.merge_states(out[rows], lse[rows], *part)
        return self._sink(out, lse).to(q.dtype)

    def _sink(self, heads: Tensor, lse: Tensor) -> Tensor:
        """What heads give [T, H, Dv], of scores of this log-sum-exp [T, H], with their sinks."""
        return heads if self.sinks is None else ops.sink_heads(heads, lse, self.sinks)

    def keep_exact(self) -> None:
        """Hold in float32 after a cast what the sums of softmaxes have in them."""
        if self.sinks is not None:
            self.sinks = nn.Parameter(self.sinks.detach().float(), self.sinks.requires_grad)

    def _attend_chunk(
        self, q: Tensor, block_table: Tensor, state: LayerState, begin: int, end: int, past: int
    ) -> tuple[slice, tuple[Tensor, Tensor]]:
        """The rows that see something of cached tokens begin .. end-1, and their partial result (float32 at least).

        A chunk of new tokens is that of the first such rows themselves: they see it causally, the rows after them
        whole.
        """
        keys, values = self._expand_cached(block_table, state, begin, end, q.dtype)
        rows = slice(max(begin - past, 0), None)
        q = q[rows]
        inside = end - begin if begin >= past else 0
        parts: list[tuple[Tensor, Tensor]] = []
        for own, causal in ((q[:inside], True), (q[inside:], False)):
            if len(own):
                bounds = [torch.tensor([0, len(part)], dtype=torch.int32) for part in (own, keys)]
                partial = torch.promote_types(q.dtype, torch.float32)
                parts.append(
                    ops.mla_prefill(own, keys, values, *bounds, scale=self.scale, causal=causal, out_dtype=partial)
                )
        if len(parts) == 1:
            return rows, parts[0]
        out, lse = zip(*parts, strict=True)
        return rows, (torch.cat(out), torch.cat(lse))

    def _expand_cached(
        self, block_table: Tensor, state: LayerState, begin: int, end: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys [n, H, Dn + R] and values [n, H, Dv] of the cached tokens begin .. end-1."""
        cached = ops.read_latents(
            state.pages,
            block_table,
            begin,
            end,
            latent_dim=self.config.kv_lora_rank,
            rope_dim=self.config.qk_rope_head_dim,
            kv_format=state.kv_format,
            dtype=dtype,
        )
        latent, k_rope = cached.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        k_nope, values = self._expand(latent)
        return torch.cat([k_nope, k_rope[:, None].expand(-1, self.num_heads, -1)], dim=-1), values


def runs(keys: Sequence[object]) -> list[tuple[int, int]]:
    """Where runs of equal keys begin and end: [1, 1, 2] -> [(0, 2), (2, 3)]."""
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(zip(starts, [*starts[1:], len(keys)], strict=True))


def chunk_bounds(first: int, past: int, total: int, chunk: int) -> list[tuple[int, int]]:
    """Cut the cached tokens first .. total-1 into runs of at most `chunk`; none crosses the first new token, `past`."""
    bounds = [(begin, min(begin + chunk, past)) for begin in range(first, past, chunk)]
    return bounds + [(begin, min(begin + chunk, total)) for begin in range(past, total, chunk)]
