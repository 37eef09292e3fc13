"""The routers of the DeepSeek line: which experts take a token, and with which weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from latentkv.checks import require_floats, require_shape
from latentkv.errors import OpError
from latentkv.ops.native import routing as native

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


def select_experts(
    logits: Tensor,
    experts_per_token: int,
    *,
    scoring: Scoring,
    correction_bias: Tensor | None = None,
    group_score: GroupScore | None = None,
    num_groups: int = 1,
    topk_group: int = 1,
    excluded: float = float("-inf"),
    normalize: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts (DeepSeek-V2, section 2.1.2; DeepSeek-V3, section 2.1.2).

    The correction bias takes part in the choice only; weights come from the unbiased scores.

    Args:
        logits: [T, E] float32 affinities.
        experts_per_token: K.
        scoring: of the affinities.
        correction_bias: [E] float32 or None.
        group_score: None: any expert; else those of the `topk_group` best of `num_groups` groups, a group being worth
            its best expert ("max") or the sum of its best two ("top2").
        num_groups: equal groups of experts that lie together.
        topk_group: how many of them a token may use.
        excluded: what experts of the other groups count in the choice (A.X-K2: 0, more than a negative score).
        normalize: weights are made to add up to one.
        scaling: what weights are multiplied by in the end.

    Returns:
        expert ids [T, K] int64, best first, and their weights [T, K] float32.

    Raises:
        OpError: there are fewer than K experts, or groups do not divide them.
    """
    experts = logits.shape[-1]
    grouped = num_groups >= 1 and experts % num_groups == 0 and 1 <= topk_group <= num_groups
    reachable = experts if group_score is None or not grouped else experts // num_groups * topk_group
    if logits.ndim != 2 or not grouped or not 1 <= experts_per_token <= reachable:
        raise OpError(
            f"select_experts takes logits [T, E] and chooses experts in topk_group of num_groups equal groups; "
            f"these are {list(logits.shape)}, {experts_per_token}, {topk_group} and {num_groups}"
        )
    if group_score == "top2" and experts == num_groups:
        raise OpError("select_experts takes groups of two experts or more where the best two count")
    if correction_bias is not None:
        require_shape("correction_bias", correction_bias, (experts,))
    groups = 0 if group_score is None else num_groups
    fast = native.select_experts(
        logits, experts_per_token, scoring == "softmax", correction_bias, groups, topk_group, excluded,
        group_score == "max", normalize, scaling,
    )  # fmt: skip
    if fast is not None:
        return fast
    require_floats(logits=logits, correction_bias=correction_bias)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if group_score is not None:
        choice = choice.masked_fill(~_allowed(choice, group_score, num_groups, topk_group), excluded)
    ids = choice.topk(experts_per_token, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling


def _allowed(choice: Tensor, group_score: GroupScore, num_groups: int, topk_group: int) -> Tensor:
    """[T, E] True where the expert's group is among the token's `topk_group` best."""
    groups = choice.unflatten(-1, (num_groups, -1))
    best = groups.amax(-1) if group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(topk_group, dim=-1).indices, True)
    return chosen[..., None].expand_as(groups).flatten(-2)
