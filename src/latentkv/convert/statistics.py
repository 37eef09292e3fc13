"""What one layer of the source does on calibration text: moments of its keys, values and queries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from latentkv.convert.attention import GQAWeights, HeadShape


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments over the calibration tokens, float64, before RoPE; tokens count as much as they are attended to.

    Attributes:
        kv_moment: [2 G d, 2 G d] E[y y^T] of y = [keys ; values], without their biases.
        kv_mean: [2 G d] E[y].
        query_moments: [H, d, d] E[q q^T] of each head.
        score_costs: [H] what a squared error of a head's score costs the output, beside one of the values.
        distances: [S] how much attention goes how far back; sums to 1.
    """

    kv_moment: Tensor
    kv_mean: Tensor
    query_moments: Tensor
    score_costs: Tensor
    distances: Tensor


@dataclass
class AttentionProfile:
    """Where a layer's attention goes, summed over sequences.

    To first order an error e_s of a head's scores moves its output by sum_s p_s e_s (v_s - o), and an error of the
    values by sum_s p_s dv_s. Independent errors add up as squares: a key or value counts sum_t p_ts^2, and a score
    costs the mean of scale^2 |W_O (v_s - o_t)|^2 under those weights.
    """

    distances: Tensor
    squares: Tensor
    costs: Tensor

    @classmethod
    def empty(cls, num_heads: int, length: int) -> AttentionProfile:
        """Nothing yet."""
        return cls(*(torch.zeros(n, dtype=torch.float64) for n in (length, num_heads, num_heads)))

    def add(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float) -> Tensor:
        """Add one sequence.

        Args:
            q: [S, H, d] rotated.
            k: [S, H, d] rotated, repeated for each query head; likewise
            v: [S, H, d].
            o: [hidden, H d] output projection.
            scale: of the scores.

        Returns:
            [S] float64 how much each token counts, mean over heads.
        """
        length, heads, _ = q.shape
        index = torch.arange(length)
        later = index[:, None] < index
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        p = (q @ k.mT * scale).masked_fill_(later, -torch.inf).softmax(-1)  # [H, S, S]
        projections = o.unflatten(1, (heads, -1)).transpose(0, 1)
        grams = projections.mT @ projections  # [H, d, d]
        outputs = p @ v
        self.distances += _by_distance(p.sum(0).double())
        squared = p.square_()
        weighted = v @ grams
        # sum_s p_ts^2 |W_O (v_s - o_t)|^2, multiplied out: no other matrix of all tokens by all is needed.
        own = (squared @ (weighted * v).sum(-1, keepdim=True)).squeeze(-1)
        crossed = (outputs * (squared @ weighted)).sum(-1)
        theirs = (outputs @ grams * outputs).sum(-1) * squared.sum(-1)
        self.costs += (own - 2 * crossed + theirs).double().sum(1).clamp(min=0) * scale**2
        self.squares += squared.sum((1, 2)).double()
        return squared.sum(1).double().mean(0)


def layer_statistics(
    weights: GQAWeights, inputs: Iterable[tuple[Tensor, Tensor]], profile: AttentionProfile, shape: HeadShape
) -> LayerStatistics:
    """Accumulate the moments.

    Args:
        weights: of the layer.
        inputs: what its projections read, [tokens, hidden] float32, and how much each token counts, piece by piece.
        profile: complete when the inputs are.
        shape: of the heads.
    """
    width = shape.kv_width
    kv_moment = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    kv_sum = torch.zeros(2 * width, dtype=torch.float64)
    query_moments = torch.zeros(shape.num_heads, shape.head_dim, shape.head_dim, dtype=torch.float64)
    joined = torch.cat([weights.k, weights.v]).float()
    query, bias = weights.q.float(), None if weights.q_bias is None else weights.q_bias.float()
    total, tokens = 0.0, 0
    for x, counted in inputs:
        y = functional.linear(x, joined).double()
        q = functional.linear(x, query, bias).double().unflatten(-1, (shape.num_heads, -1))
        weighted = y * counted[:, None]
        kv_moment += weighted.mT @ y
        kv_sum += weighted.sum(0)
        query_moments += torch.einsum("thd,the->hde", q, q)
        total, tokens = total + float(counted.sum()), tokens + len(x)
    return LayerStatistics(
        kv_moment / total,
        kv_sum / total,
        query_moments / tokens,
        profile.costs / profile.squares,
        profile.distances / profile.distances.sum(),
    )


def _by_distance(matrix: Tensor) -> Tensor:
    """[S, S], zero above the diagonal -> [S]: sums of the diagonals, the main one first."""
    length = len(matrix)
    # Each row is moved right by its number, which brings every diagonal of the mirrored matrix into one column.
    moved = functional.pad(matrix.flip(1), (0, length)).flatten()[:-length].view(length, 2 * length - 1)
    return moved.sum(0)[length - 1 :]
