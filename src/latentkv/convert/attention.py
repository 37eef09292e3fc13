"""One layer's grouped-query attention as latent attention: the steps of the conversion put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.convert.factor import Factors, factorize
from latentkv.convert.rotation import Rotation


@dataclass(frozen=True)
class HeadShape:
    """H query heads, G key/value heads, and their width d."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """G d."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class GQAWeights:
    """A layer's projections, float64, output by input as they are stored; biases None where there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class MLAWeights:
    """A layer's projections of latent attention without a norm on the latent, float64.

    Attributes:
        q: [H (d + R), hidden]; a head's d dimensions without position, then R with (interleaved pairs).
        kv_a: [r + R, hidden]: latent, then shared key.
        kv_b: [H 2d, r]: a head's keys, then its values.
        o: [hidden, H d].
        q_bias, kv_a_bias, o_bias: None where there are none.
    """

    q: Tensor
    kv_a: Tensor
    kv_b: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    kv_a_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """A rotation, and which of its pairs keep their RoPE.

    Attributes:
        rotation: of all key dimensions.
        kept: [R / 2] indices of pairs.
        turn: [d / 2] complex128, what stands for RoPE's factor in the others (see `mean_turn`); ones: nothing.
    """

    rotation: Rotation
    kept: Tensor
    turn: Tensor

    @property
    def rope_rows(self) -> Tensor:
        """[R, G d]: the key dimensions that keep their RoPE."""
        return self._rows(self.kept)

    @property
    def nope_rows(self) -> Tensor:
        """[G d - R, G d]: the key dimensions that lose it."""
        return self._rows(self._rest)

    @property
    def nope_query_rows(self) -> Tensor:
        """[G d - R, G d]: those of the queries, turned by the mean of what RoPE would have turned them by."""
        rho = self.turn[self.rotation.frequency[self._rest]][:, None, None]
        re, im = self.nope_rows.unflatten(0, (-1, 2)).split(1, dim=1)
        return torch.cat([rho.real * re - rho.imag * im, rho.imag * re + rho.real * im], dim=1).flatten(0, 1)

    @property
    def _rest(self) -> Tensor:
        rest = torch.ones(len(self.rotation.frequency), dtype=torch.bool)
        rest[self.kept] = False
        return rest.nonzero()[:, 0]

    def _rows(self, pairs: Tensor) -> Tensor:
        return self.rotation.matrix.unflatten(0, (-1, 2))[pairs].flatten(0, 1)


def lifted(rows: Tensor, head: int, shape: HeadShape) -> Tensor:
    """[n, d]: what rows [n, G d] over all key heads do to query head `head`, which reads one of them."""
    group = head // (shape.num_heads // shape.num_kv_heads)
    return rows[:, group * shape.head_dim : (group + 1) * shape.head_dim]


def query_weight(split: Split, query_moments: Tensor, shape: HeadShape) -> Tensor:
    """What an error of the keys without RoPE costs the scores: sum over heads of E[q' q'^T], [G d - R, G d - R].

    Args:
        split: the pairs.
        query_moments: [H, d, d] E[q q^T] of each head before RoPE.
        shape: of the heads.
    """
    rows = split.nope_query_rows
    lifts = torch.stack([lifted(rows, head, shape) for head in range(shape.num_heads)])
    return torch.einsum("hnd,hde,hme->nm", lifts, query_moments, lifts)


def output_weight(o: Tensor, shape: HeadShape) -> Tensor:
    """What an error of the values costs the output: sum over a group's heads of W_O^T W_O, [G d, G d]."""
    per_head = o.unflatten(1, (shape.num_kv_heads, -1, shape.head_dim))
    blocks = torch.einsum("ogmd,ogme->gde", per_head, per_head)
    return torch.block_diag(*blocks)


def joint_moment(split: Split, moment: Tensor) -> Tensor:
    """E[y y^T] of y = [keys without RoPE ; values] from that of [keys ; values] as they are."""
    rows = split.nope_rows
    width = rows.shape[1]
    keys = rows @ moment[:width]
    top = torch.cat([keys[:, :width] @ rows.mT, keys[:, width:]], dim=1)
    bottom = torch.cat([keys[:, width:].mT, moment[width:, width:]], dim=1)
    return torch.cat([top, bottom])


def joint_factors(
    split: Split, moment: Tensor, key_weight: Tensor, value_weight: Tensor, rank: int, *, mean: Tensor | None = None
) -> Factors:
    """Factors of [keys without RoPE ; values] of rank r; with `mean`, keys may be off by a constant."""
    rows = split.nope_rows
    weight = torch.block_diag(key_weight, value_weight)
    if mean is not None:
        mean = torch.cat([rows @ mean[: rows.shape[1]], mean[rows.shape[1] :]])
    return factorize(joint_moment(split, moment), weight, rank, mean=mean, centred=0 if mean is None else len(rows))


def assemble(
    weights: GQAWeights, split: Split, factors: Factors, shape: HeadShape, *, query_scale: float = 1.0
) -> MLAWeights:
    """The projections of latent attention.

    Its softmax divides by sqrt(d + R) where the source's divides by sqrt(d): the queries are scaled by the ratio, and
    by `query_scale`, which is what the source multiplies its scores by besides. A bias
    of the keys without RoPE adds the same to all scores of a query and drops out; one of the values passes through the
    attention, whose weights sum to one, into the output's.
    """
    rope, nope_keys, nope_queries = split.rope_rows, split.nope_rows, split.nope_query_rows
    width = nope_keys.shape[0]
    sigma = query_scale * ((shape.head_dim + rope.shape[0]) / shape.head_dim) ** 0.5
    key_decoder, value_decoder = factors.decoder[:width], factors.decoder[width:]
    encoder = factors.encoder[:, :width] @ nope_keys @ weights.k + factors.encoder[:, width:] @ weights.v
    q_heads = weights.q.unflatten(0, (shape.num_heads, -1))
    values = value_decoder.unflatten(0, (shape.num_kv_heads, -1))
    group = shape.num_heads // shape.num_kv_heads
    up: list[Tensor] = []
    queries: list[Tensor] = []
    biases: list[Tensor] = []
    for head in range(shape.num_heads):
        rope_lift = lifted(rope, head, shape)
        up += [lifted(nope_queries, head, shape).mT @ key_decoder, values[head // group]]
        queries += [q_heads[head], rope_lift @ q_heads[head]]
        if weights.q_bias is not None:
            bias = weights.q_bias.unflatten(0, (shape.num_heads, -1))[head]
            biases += [bias, rope_lift @ bias]
    return MLAWeights(
        q=sigma * torch.cat(queries),
        kv_a=torch.cat([encoder, rope @ weights.k]),
        kv_b=torch.cat(up),
        o=weights.o,
        q_bias=sigma * torch.cat(biases) if biases else None,
        kv_a_bias=_kv_a_bias(weights, rope, len(encoder)),
        o_bias=_output_bias(weights, shape),
    )


def _kv_a_bias(weights: GQAWeights, rope: Tensor, rank: int) -> Tensor | None:
    if weights.k_bias is None:
        return None
    return torch.cat([torch.zeros(rank, dtype=torch.float64), rope @ weights.k_bias])


def _output_bias(weights: GQAWeights, shape: HeadShape) -> Tensor | None:
    if weights.v_bias is None:
        return weights.o_bias
    per_head = weights.v_bias.unflatten(0, (shape.num_kv_heads, 1, -1))
    everyone = per_head.expand(-1, shape.num_heads // shape.num_kv_heads, -1).flatten()
    through = weights.o @ everyone
    return through if weights.o_bias is None else through + weights.o_bias
