"""The definition of every op, in float64 and in the order of the paper (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Slow on purpose: one query row at a time, nothing cut into blocks. The fast ops must equal these; where they differ,
these are right. Shapes are those of the fast ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from latentkv.ops.kv_formats import SCALE_GROUP, KVFormat
from latentkv.ops.swiglu_limit import SwigluLimit

NEG_INF = float("-inf")


def attend_row(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query row: q [H, D], keys [n, H, D], values [n, H, Dv] -> out [H, Dv], lse [H].

    Zero and -inf where there is nothing to read (n = 0).
    """
    if keys.shape[0] == 0:
        return torch.zeros(q.shape[0], values.shape[2]).double(), torch.full((q.shape[0],), NEG_INF).double()
    scores = torch.einsum("hd,nhd->hn", q.double(), keys.double()) * scale
    return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values.double()), scores.logsumexp(dim=-1)


def mla_expanded(
    q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, stop: Tensor, scale: float
) -> Tensor:
    """MLA as published (eq. 9-11, 14-19): expand every latent to a key and a value per head, then attend.

    Args:
        q_nope: [T, H, Dn].
        q_rope: [T, H, R], rotated.
        c: [S, L] normed latents.
        k_rope: [S, R], rotated, shared by all heads.
        w_uk: [H, Dn, L].
        w_uv: [H, Dv, L].
        stop: [T]; row t reads the tokens s < stop[t].
        scale: softmax scale.

    Returns:
        [T, H, Dv].
    """
    q_nope, q_rope, c, k_rope, w_uk, w_uv = (t.double() for t in (q_nope, q_rope, c, k_rope, w_uk, w_uv))
    heads = q_nope.shape[1]
    keys = torch.cat([torch.einsum("hdl,sl->shd", w_uk, c), k_rope[:, None].expand(-1, heads, -1)], dim=-1)
    values = torch.einsum("hdl,sl->shd", w_uv, c)
    q = torch.cat([q_nope, q_rope], dim=-1)
    return torch.stack([attend_row(q[t], keys[:n], values[:n], scale)[0] for t, n in enumerate(stop.tolist())])


def mla_absorbed(
    q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, stop: Tensor, scale: float
) -> Tensor:
    """The same function with W_UK moved to the query and W_UV to the output: attention over the latents themselves."""
    q_nope, q_rope, c, k_rope, w_uk, w_uv = (t.double() for t in (q_nope, q_rope, c, k_rope, w_uk, w_uv))
    heads = q_nope.shape[1]
    q = torch.cat([torch.einsum("hdl,thd->thl", w_uk, q_nope), q_rope], dim=-1)
    cached = torch.cat([c, k_rope], dim=-1)[:, None].expand(-1, heads, -1)
    latents = c[:, None].expand(-1, heads, -1)
    out = torch.stack([attend_row(q[t], cached[:n], latents[:n], scale)[0] for t, n in enumerate(stop.tolist())])
    return torch.einsum("hdl,thl->thd", w_uv, out)


def mla_attend(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    latent_dim: int,
    scale: float,
    kv_format: KVFormat | None = None,
    start: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA over pages, see `attention.mla_attend`: out [T, H, L] and lse [T, H] in float64."""
    heads, width = q.shape[1:]
    rows: list[tuple[Tensor, Tensor]] = []
    for t, b in _rows(q_start):
        if slots is None:
            stored = _tokens(kv_pages, block_table[b], 0 if start is None else int(start[t]), int(stop[t]))
        else:
            stored = kv_pages.flatten(0, 1)[slots[t][slots[t] >= 0].long()]
        cached = decode_latents(stored, kv_format, latent_dim, width - latent_dim)[:, None].expand(-1, heads, -1)
        rows.append(attend_row(q[t], cached, cached[..., :latent_dim], scale))
    return _stack(rows, q.shape[1], latent_dim)


def index_keys(
    k: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, *, interleaved: bool
) -> Tensor:
    """Layer-normed k [T, D], its first R numbers rotated: what `index_keys.write_index_keys` stores."""
    k = k.double()
    k = k - k.mean(dim=-1, keepdim=True)
    k = weight.double() * k / torch.sqrt(k.square().mean(dim=-1, keepdim=True) + eps) + bias.double()
    width = 2 * cos.shape[1]
    return torch.cat([apply_rope(k[:, :width], cos, sin, interleaved=interleaved), k[:, width:]], dim=1)


def pooled_index_keys(keys: Tensor, gates: Tensor, ape: Tensor) -> Tensor:
    """The keys [S // G, D] of the whole pools of G tokens of one sequence: normed keys and gates [S, D], ape [G, D]."""
    pools = list[Tensor]()
    for first in range(0, len(keys) // len(ape) * len(ape), len(ape)):
        own = slice(first, first + len(ape))
        weights = (gates[own].double() + ape.double()).exp()
        pools.append((weights / weights.sum(dim=0) * keys[own].double()).sum(dim=0))
    return torch.stack(pools) if pools else keys.new_zeros(0, keys.shape[1]).double()


def hadamard(x: Tensor) -> Tensor:
    """Rows x [..., D] times Sylvester's matrix, whose entry (i, j) is -1 to the number of bits that i and j share."""
    bits = torch.arange(x.shape[-1])
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in bits.tolist()] for i in bits.tolist()])
    return x.double() @ signs.double() * x.shape[-1] ** -0.5


def decode_index_keys(rows: Tensor) -> Tensor:
    """The keys [n, D] that int8 rows [n, D + 4] stand for: codes times a float32 scale, the rotation undone."""
    return hadamard(rows[:, :-4].double() * rows[:, -4:].clone().view(torch.float32).double())


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """`sum_h w[h] ReLU(D^-1/2 q[h] . k[s])` of one row: q [H, D], weights [H], keys [S, D] -> [S]."""
    products = torch.einsum("hd,sd->hs", q.double(), keys.double()) * q.shape[1] ** -0.5
    return torch.einsum("h,hs->s", weights.double(), products.relu())


def select_slots(
    q: Tensor,
    weights: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    topk: int,
    start: Tensor | None = None,
) -> Tensor:
    """The slots of each row's best tokens, of equal scores the earlier, see `sparse.select_slots`: [T, K] int32."""
    slots = torch.full((q.shape[0], topk), -1, dtype=torch.int32)
    page_size = key_pages.shape[1]
    for t, b in _rows(q_start):
        first = 0 if start is None else int(start[t])
        keys = _tokens(key_pages, block_table[b], first, int(stop[t]))
        scores = index_scores(q[t], weights[t], decode_index_keys(keys) if keys.dtype == torch.int8 else keys)
        best = scores.argsort(descending=True, stable=True)[:topk]
        for place, s in enumerate(sorted(best.tolist())):
            page, offset = divmod(first + s, page_size)
            slots[t, place] = int(block_table[b, page]) * page_size + offset
    return slots


def gqa_attend(
    q: Tensor,
    kv_pages: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    stop: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention over pages, see `attention.gqa_attend`; head h reads key/value head h // (H / G)."""
    heads, dim = q.shape[1:]
    shared_by = heads // kv_pages.shape[3]
    rows: list[tuple[Tensor, Tensor]] = []
    for t, b in _rows(q_start):
        stored = _tokens(kv_pages, block_table[b], 0 if start is None else int(start[t]), int(stop[t]))
        keys, values = stored.repeat_interleave(shared_by, dim=2).unbind(dim=1)
        rows.append(attend_row(q[t], keys, values, scale))
    return _stack(rows, heads, dim)


def short_convolution(x: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Causal, each channel by itself, then silu: x [T, C], taps [4, C] (the last: the newest token's), past [3, C]."""
    window = torch.cat([past.double(), x.double()])
    rows = [(window[t : t + len(taps)] * taps.double()).sum(dim=0) for t in range(len(x))]
    summed = torch.stack(rows) if rows else x.double()
    return summed * summed.sigmoid()


def kda_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of one head (arXiv 2510.26692, eq. 1): q, k, log_decay [T, Dk], v [T, Dv], beta [T].

    Args:
        q: scaled.
        k: of length 1.
        v: the values.
        log_decay: of each channel of the key.
        beta: how much of each value is written.
        matrix: [Dk, Dv] before the first token.

    Returns:
        [T, Dv] and the matrix after the last token.
    """
    q, k, v, beta, matrix = (t.double() for t in (q, k, v, beta, matrix))
    decay, rows = log_decay.double().exp(), list[Tensor]()
    for t in range(len(q)):
        matrix = torch.diag(decay[t]) @ matrix
        matrix = matrix + torch.outer(k[t], beta[t] * (v[t] - matrix.T @ k[t]))
        rows.append(matrix.T @ q[t])
    return (torch.stack(rows) if rows else v), matrix


def kda(
    qkv: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    *,
    taps: Tensor,
    log_rate: Tensor,
    gate_bias: Tensor,
    norm: Tensor,
    norm_eps: float,
    lower_bound: float | None,
    matrices: Tensor,
    past: Tensor,
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention over the T tokens of one sequence, see `kda.kda_attend`.

    Args:
        qkv: [T, 3 H D].
        gate: [T, H D].
        beta: [T, H].
        output_gate: [T, H D].
        taps: [4, 3 H D].
        log_rate: [H].
        gate_bias: [H D].
        norm: [D].
        norm_eps: of the norm.
        lower_bound: of the logarithm of the decay; None: none.
        matrices: [H, D, D] before the first token.
        past: [3, 3 H D], the rows of qkv before the first.

    Returns:
        [T, H D] and the matrices [H, D, D] after the last token.
    """
    heads, dim = log_rate.shape[0], norm.shape[0]
    q, k, v = short_convolution(qkv, taps, past).unflatten(-1, (3, heads, dim)).unbind(1)
    q, k = (t / torch.sqrt(t.square().sum(dim=-1, keepdim=True) + 1e-6) for t in (q, k))
    x = (gate.double() + gate_bias.double()).unflatten(-1, (heads, dim))
    rate = log_rate.double().exp()[:, None]
    bounded = lower_bound is not None
    log_decay = lower_bound * (rate * x).sigmoid() if bounded else -rate * torch.log1p(x.exp())
    outs, after = list[Tensor](), list[Tensor]()
    for h in range(heads):
        o, matrix = kda_recurrence(
            q[:, h] * dim**-0.5, k[:, h], v[:, h], log_decay[:, h], beta.double().sigmoid()[:, h], matrices[h]
        )
        outs.append(rms_norm(o, norm, norm_eps))
        after.append(matrix)
    return torch.stack(outs, dim=1).flatten(1) * output_gate.double().sigmoid(), torch.stack(after)


def lightning(
    qkv: Tensor,
    output_gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    log_decay: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    output_norm: Tensor,
    norm_eps: float,
    num_groups: int,
    matrices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Lightning attention over the T tokens of one sequence, see `lightning.lightning_attend`.

    Args:
        qkv: [T, 3 H D].
        output_gate: [T, H D].
        cos: [T, R / 2], of a head's first R dimensions, which are turned in halves.
        sin: [T, R / 2].
        log_decay: [H], below 0.
        query_norm: [D].
        key_norm: [D].
        output_norm: [H D].
        norm_eps: of the norms.
        num_groups: of heads' dimensions that are normed together.
        matrices: [H, D, D] before the first token.

    Returns:
        [T, H D] and the matrices [H, D, D] after the last token.
    """
    heads, dim, turned = log_decay.shape[0], query_norm.shape[0], 2 * cos.shape[1]
    q, k, v = qkv.double().unflatten(-1, (3, heads, dim)).unbind(1)
    q, k = rms_norm(q, query_norm, norm_eps), rms_norm(k, key_norm, norm_eps)
    q, k = (
        torch.cat([apply_rope(t[..., :turned], cos, sin, interleaved=False), t[..., turned:]], dim=-1) for t in (q, k)
    )
    state, decay, rows = matrices.double(), log_decay.double().exp()[:, None, None], list[Tensor]()
    for t in range(len(qkv)):
        state = decay * state + torch.einsum("hi,hj->hij", k[t], v[t])
        rows.append(torch.einsum("hi,hij->hj", q[t] * dim**-0.5, state))
    o = torch.stack(rows).flatten(1).unflatten(-1, (num_groups, -1))
    normed = o / torch.sqrt(o.square().mean(dim=-1, keepdim=True) + norm_eps)
    return normed.flatten(1) * output_norm.double() * output_gate.double().sigmoid(), state


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, q_start: Tensor, kv_start: Tensor, *, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Ragged expanded attention, see `prefill.mla_prefill`; causal rows are aligned to the end of the keys."""
    rows: list[tuple[Tensor, Tensor]] = []
    for t, b in _rows(q_start):
        first, last = int(kv_start[b]), int(kv_start[b + 1])
        stop = max(first, last - (int(q_start[b + 1]) - 1 - t)) if causal else last
        rows.append(attend_row(q[t], k[first:stop], v[first:stop], scale))
    return _stack(rows, q.shape[1], v.shape[2])


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over two parts: each part's output weighs exp(lse) of the whole; an empty whole gives 0 and -inf."""
    sum_a, sum_b = lse_a.double().exp(), lse_b.double().exp()
    total = sum_a + sum_b
    out = (sum_a[..., None] * out_a.double() + sum_b[..., None] * out_b.double()) / total[..., None]
    return torch.where(total[..., None] > 0, out, 0.0), total.log()


def decode_latents(rows: Tensor, kv_format: KVFormat | None, latent_dim: int, rope_dim: int) -> Tensor:
    """The numbers [T, L + R] that stored rows stand for, in float64 (`kv_formats` gives the layouts)."""
    width = latent_dim + rope_dim
    groups = -(-latent_dim // SCALE_GROUP)
    group_of = torch.arange(latent_dim) // SCALE_GROUP
    if kv_format == "int8":
        scales = rows[:, width : width + 2 * (groups + 1)].clone().view(torch.float16).double()
        group_of = torch.cat([group_of, torch.full((rope_dim,), groups)])
        return rows[:, :width].view(torch.int8).double() * scales[:, group_of]
    if kv_format == "fp8":
        rope_at = latent_dim + 4 * groups
        scales = rows[:, latent_dim:rope_at].clone().view(torch.float32).double()
        latents = rows[:, :latent_dim].view(torch.float8_e4m3fn).double() * scales[:, group_of]
        k_rope = rows[:, rope_at : rope_at + 2 * rope_dim].clone().view(torch.bfloat16).double()
        return torch.cat([latents, k_rope], dim=1)
    return rows[:, :width].double()


def linear(x: Tensor, weight: Tensor, *added: Tensor) -> Tensor:
    """`x W^T` plus whatever is added (bias, residual)."""
    return torch.einsum("...d,od->...o", x.double(), weight.double()) + sum(t.double() for t in added)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`."""
    x = x.double()
    return weight.double() * x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def mix_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How a token's n streams [n, D] are mixed (mHC, arXiv 2512.24880): pre [n], post [n], comb [n, n]."""
    n = len(streams)
    f = streams.double().flatten()
    m = fn.double() @ (f / torch.sqrt(f.square().mean() + norm_eps))
    m = m * scale.double().repeat_interleave(torch.tensor([n, n, n * n])) + base.double()
    comb = m[2 * n :].view(n, n).softmax(dim=1) + eps
    for i in range(iterations):
        comb = comb / (comb.sum(dim=1)[:, None] + eps) if i else comb
        comb = comb / (comb.sum(dim=0)[None] + eps)
    return m[:n].sigmoid() + eps, 2 * m[n : 2 * n].sigmoid(), comb


def gate_streams(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float, magnitude: float
) -> list[Tensor]:
    """What a token's n streams [n, D] are read by and, with a second scale, written by (iHC): [n] each."""
    n, f = len(streams), streams.double().flatten()
    m = fn.double() @ (f / torch.sqrt(f.square().mean() + norm_eps))
    m = m * scale.double().repeat_interleave(n) + base.double()
    return [(magnitude if i else 1) * part.sigmoid() + eps for i, part in enumerate(m.split(n))]


def collapse_streams(streams: Tensor, weights: Tensor) -> Tensor:
    """What a block reads of a token's streams [n, D], each with its weight [n]."""
    return weights.double() @ streams.double()


def expand_streams(streams: Tensor, block: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """A token's streams [n, D] after a block that gave [D]: `comb[j, k]` is what stream j counts in stream k."""
    return torch.outer(post.double(), block.double()) + comb.double().T @ streams.double()


def gated_rms_norm(x: Tensor, weight: Tensor, eps: float, down: Tensor, up: Tensor) -> Tensor:
    """`y * sigmoid(up silu(down y))` of the normed x, y."""
    y = rms_norm(x, weight, eps)
    hidden = y @ down.double().T
    return y * ((hidden * hidden.sigmoid()) @ up.double().T).sigmoid()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Multiply each pair of x [T, ..., R], seen as a complex number, by cos + i sin [T, R/2]."""
    half = x.shape[-1] // 2
    pairs = x.double().unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    angles = torch.complex(cos.double(), sin.double()).view(x.shape[0], *[1] * (x.ndim - 2), half)
    turned = torch.complex(first, second) * angles
    return torch.stack([turned.real, turned.imag], dim=-1 if interleaved else -2).flatten(-2)


def silu_mul(gate_up: Tensor, limit: SwigluLimit | None = None) -> Tensor:
    """`gate * sigmoid(gate) * up`, side by side in [..., 2I]; bounded where there is a limit (`swiglu_limit.py`)."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    if limit is None:
        return gate * gate.sigmoid() * up
    before, after = (limit.value, float("inf")) if limit.bounds_gate else (float("inf"), limit.value)
    gate = gate.clamp(max=before)
    return (gate * gate.sigmoid()).clamp(max=after) * up.clamp(-limit.value, limit.value)


def gate_heads(x: Tensor, gate: Tensor) -> Tensor:
    """`x * sigmoid(gate)` of x [..., H, D] and gate [..., H] or [..., H D]."""
    return x.double() * gate.double().sigmoid().unflatten(-1, (x.shape[-2], -1))


def sink_heads(x: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What heads gave, [..., H, D], had exp(sink) been in the sum of their softmax, whose logarithm lse [..., H] is."""
    return x.double() * (lse.double().exp() / (lse.double().exp() + sinks.double().exp()))[..., None]


def moe_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: SwigluLimit | None = None
) -> Tensor:
    """Token by token: the weighted sum of its K experts, each `down (silu(gate x) * up x)`; from E on each gives x."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, ids in enumerate(expert_ids.tolist()):
        for k, e in enumerate(ids):
            given = x[t].double()
            if e < len(gate_up):
                given = down[e].double() @ silu_mul(gate_up[e].double() @ given, limit)
            out[t] += weights[t, k].double() * given
    return out


def dequantize_weight(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Weight [..., O, D] of integer codes [..., O, D] and scales [..., O, groups]: input d is in group d // group."""
    group_of = torch.arange(codes.shape[-1]) // group
    return codes.double() * scales.double()[..., group_of]


def _rows(q_start: Tensor) -> Iterator[tuple[int, int]]:
    """(row, its sequence) for every query row."""
    for b, (first, last) in enumerate(pairwise(q_start.tolist())):
        for t in range(first, last):
            yield t, b


def _tokens(pages: Tensor, table: Tensor, start: int, stop: int) -> Tensor:
    """Cached tokens start <= s < stop of the sequence with this row of the block table."""
    s = torch.arange(start, max(start, stop))
    return pages[table[s // pages.shape[1]].long(), s % pages.shape[1]]


def _stack(rows: list[tuple[Tensor, Tensor]], heads: int, value_dim: int) -> tuple[Tensor, Tensor]:
    if not rows:
        return torch.zeros(0, heads, value_dim).double(), torch.zeros(0, heads).double()
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])
