"""One layer, from its statistics to the projections of latent attention: which pairs keep RoPE, and which factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentkv.convert.allocation import choose_counts, choose_grid, choose_pairs, gains, loss_without_rope, mean_turn
from latentkv.convert.attention import (
    GQAWeights,
    HeadShape,
    MLAWeights,
    Split,
    assemble,
    joint_factors,
    joint_moment,
    output_weight,
    query_weight,
)
from latentkv.convert.factor import Factors
from latentkv.convert.options import Method
from latentkv.convert.rotation import Rotation, folded_rotation, unitary_rotation
from latentkv.convert.statistics import LayerStatistics


@dataclass(frozen=True)
class LayerPlan:
    """How every layer is to be converted.

    Attributes:
        rank: r, of the latent.
        rope_dim: R, dimensions that keep their RoPE.
        method: "weighted": this package's; "transmla": arXiv 2502.07864; "svd": of the weights alone, without data.
        fold: neighbouring frequencies that share a basis, of "transmla".
        counts: [d / 2] pairs of each frequency that keep their RoPE, of "weighted"; empty: each layer's own best.
        grid: whether the frequencies that keep their RoPE must be those of a plain one, of "weighted".
    """

    rank: int
    rope_dim: int
    method: Method = "weighted"
    fold: int = 1
    counts: tuple[int, ...] = ()
    grid: bool = False

    def best_counts(self, gains: Tensor, frequencies: Tensor) -> Tensor:
        """[d / 2] pairs of each frequency that should keep their RoPE, by what that saves (see `gains`)."""
        count = self.rope_dim // 2
        return choose_grid(gains, frequencies, count) if self.grid else choose_counts(gains, count)


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer's latent attention.

    Attributes:
        weights: its projections.
        frequencies: [R / 2] float64, of the shared key's pairs.
        rope_energy: share of the keys' energy that keeps its RoPE.
        kept_energy: share of the weighted energy that the factors keep.
    """

    weights: MLAWeights
    frequencies: Tensor
    rope_energy: float
    kept_energy: float


def split_layer(
    weights: GQAWeights, statistics: LayerStatistics, plan: LayerPlan, shape: HeadShape, frequencies: Tensor
) -> Split:
    """Rotate the keys, and choose what keeps its RoPE."""
    width, half, count = shape.kv_width, shape.head_dim // 2, plan.rope_dim // 2
    if plan.method != "weighted":
        moment = weights.k @ weights.k.mT if plan.method == "svd" else statistics.kv_moment[:width, :width]
        rotation = folded_rotation(moment, shape.num_kv_heads, plan.fold)
        return Split(
            rotation, _leading_pairs(rotation, count, half, plan.fold), torch.ones(half, dtype=torch.complex128)
        )
    rotation = unitary_rotation(statistics.kv_moment[:width, :width], shape.num_kv_heads)
    loss = _rope_loss(rotation, statistics, shape, frequencies)
    best = plan.best_counts(gains(rotation, loss, half), frequencies)
    counts = torch.tensor(plan.counts) if plan.counts else best
    return Split(rotation, choose_pairs(rotation, loss, counts), mean_turn(frequencies, statistics.distances))


def convert_layer(
    weights: GQAWeights,
    statistics: LayerStatistics,
    plan: LayerPlan,
    shape: HeadShape,
    frequencies: Tensor,
    scale: float,
    *,
    balance: float = 1.0,
) -> ConvertedLayer:
    """Latent attention in the place of grouped-query attention.

    Args:
        weights: of the source's layer.
        statistics: of that layer on calibration text.
        plan: sizes and method.
        shape: of the heads.
        frequencies: theta_l, [d / 2] float64.
        scale: of the source's scores; the queries are scaled so that latent attention's own gives the same.
        balance: what an error of the keys costs beside one of the values, as a multiple of what is predicted.
    """
    split = split_layer(weights, statistics, plan, shape, frequencies)
    factors = _factors(weights, statistics, plan, shape, split, balance)
    scaled = scale * shape.head_dim**0.5  # 1, unless the source multiplies its scores by something else as well
    assembled = assemble(weights, split, factors, shape, query_scale=scaled)
    energy = split.rotation.energy
    return ConvertedLayer(
        assembled,
        frequencies[split.rotation.frequency[split.kept]],
        float(energy[split.kept].sum() / energy.sum()),
        factors.kept,
    )


def _factors(
    weights: GQAWeights,
    statistics: LayerStatistics,
    plan: LayerPlan,
    shape: HeadShape,
    split: Split,
    balance: float,
) -> Factors:
    width = shape.kv_width
    rest = width - plan.rope_dim
    if plan.method == "weighted":
        key_weight = balance * query_weight(split, costed_queries(statistics), shape)
        value_weight = output_weight(weights.o, shape)
        return joint_factors(split, statistics.kv_moment, key_weight, value_weight, plan.rank, mean=statistics.kv_mean)
    moment = statistics.kv_moment
    if plan.method == "svd":
        joined = torch.cat([weights.k, weights.v])
        moment = joined @ joined.mT
    # TransMLA's balance: keys without RoPE are scaled to the values' norm.
    joint = joint_moment(split, moment).diagonal()
    ratio = float(joint[rest:].mean() / joint[:rest].mean()) if plan.method == "transmla" and rest else 1.0
    eye = torch.eye(width, dtype=torch.float64)
    return joint_factors(split, moment, ratio * eye[:rest, :rest], eye, plan.rank)


def _pair_energy(rotation: Rotation, queries: Tensor, shape: HeadShape) -> Tensor:
    """[pairs] mean square of the queries' pairs, summed over heads."""
    group = shape.num_heads // shape.num_kv_heads
    per_group = queries.unflatten(0, (shape.num_kv_heads, group)).sum(1)
    moment = torch.block_diag(*per_group)
    return ((rotation.matrix @ moment) * rotation.matrix).sum(1).unflatten(0, (-1, 2)).sum(1)


def _leading_pairs(rotation: Rotation, count: int, half: int, fold: int) -> Tensor:
    """TransMLA's choice: of every fold the same number of leading components, spread evenly where it is no multiple."""
    groups = half // fold
    per_group = len(rotation.frequency) // groups
    each, extra = divmod(count, groups)
    chosen = [
        group * per_group + i
        for group in range(groups)
        for i in range(each + (1 if group * extra % groups < extra else 0))
    ]
    return torch.tensor(sorted(chosen)[:count])


def rope_gains(weights: GQAWeights, statistics: LayerStatistics, shape: HeadShape, frequencies: Tensor) -> Tensor:
    """[d / 2, G] what keeping the RoPE of each frequency's pairs saves, most first, as a share of the output."""
    width = shape.kv_width
    energy = float((output_weight(weights.o, shape) * statistics.kv_moment[width:, width:]).sum())
    rotation = unitary_rotation(statistics.kv_moment[:width, :width], shape.num_kv_heads)
    loss = _rope_loss(rotation, statistics, shape, frequencies)
    return gains(rotation, loss, shape.head_dim // 2) / energy


def _rope_loss(rotation: Rotation, statistics: LayerStatistics, shape: HeadShape, frequencies: Tensor) -> Tensor:
    energy = _pair_energy(rotation, costed_queries(statistics), shape)
    return loss_without_rope(rotation, energy, mean_turn(frequencies, statistics.distances))


def costed_queries(statistics: LayerStatistics) -> Tensor:
    """[H, d, d] E[q q^T] of each head times what an error of its scores costs."""
    return statistics.query_moments * statistics.score_costs[:, None, None]
