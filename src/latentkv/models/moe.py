"""Mixture of experts: the routers of the DeepSeek line, and the block of routed and shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv import ops
from latentkv.models.config import MoEConfig
from latentkv.models.layers import MLP, RMSNorm
from latentkv.models.packing import Packer
from latentkv.ops import PackedWeight


def select_experts(logits: Tensor, config: MoEConfig, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose each token's experts (DeepSeek-V2, section 2.1.2; DeepSeek-V3, section 2.1.2).

    The correction bias takes part in the choice only; weights come from the unbiased scores.

    Args:
        logits: [T, E] float32 affinities.
        config: scoring, groups, normalisation and scaling.
        correction_bias: [E] or None.

    Returns:
        expert ids [T, K] int64 and their weights [T, K] float32.
    """
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if config.group_score is not None:
        choice = choice.masked_fill(~_allowed_groups(choice, config), float("-inf"))
    ids = choice.topk(config.experts_per_token, dim=-1).indices
    weights = scores.gather(-1, ids)
    if config.normalize_weights:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * config.scaling_factor


def _allowed_groups(choice: Tensor, config: MoEConfig) -> Tensor:
    """[T, E] True where the expert's group is among the token's `topk_group` best."""
    groups = choice.unflatten(-1, (config.num_groups, -1))
    best = groups.amax(-1) if config.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(config.topk_group, dim=-1).indices, True)
    return chosen[..., None].expand_as(groups).flatten(-2)


class Router(nn.Module):
    """Scores tokens against experts, in float32 whatever the model's dtype."""

    packed: PackedWeight | None = None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> expert ids [T, K] and weights [T, K] float32."""
        if self.packed is not None:
            logits = ops.linear(x, self.packed, out_dtype=torch.float32)
        else:
            with torch.autocast(x.device.type, enabled=False):
                logits = functional.linear(x.float(), self.weight.float())
        return select_experts(logits, self.config, self.e_score_correction_bias)

    def pack(self, packer: Packer) -> None:
        """See `Packable`; a float32 router stays as it is, for packing would round it."""
        if self.weight.dtype == torch.bfloat16:
            self.packed = packer("weight")


class Experts(nn.Module):
    """The routed experts' weights, stacked, as trained or packed for inference."""

    gate_up: PackedWeight | None = None
    down: PackedWeight | None = None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        experts, width = config.num_experts, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """[T, hidden] -> weighted sum of each token's experts, [T, hidden]."""
        gate_up = self.gate_up_proj if self.gate_up is None else self.gate_up
        down = self.down_proj if self.down is None else self.down
        return ops.moe_experts(x, expert_ids, weights, gate_up, down)

    def pack(self, packer: Packer) -> None:
        """See `Packable`."""
        self.gate_up, self.down = packer("gate_up_proj"), packer("down_proj")


class MoE(nn.Module):
    """Routed experts plus shared ones (DeepSeekMoE, arXiv 2401.06066).

    In training, `expert_counts` [E] int64 holds how many tokens the last forward sent to each expert (None before it).
    """

    def __init__(self, hidden_size: int, config: MoEConfig, *, norm_eps: float, bias: bool = False) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)
        if config.num_shared_experts:
            self.shared_experts = MLP(hidden_size, config.intermediate_size * config.num_shared_experts, bias=bias)
        if config.post_norm:
            self.post_mlp_layernorm = RMSNorm(hidden_size, norm_eps)
        self.config = config
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        tokens = x.flatten(0, -2)
        expert_ids, weights = self.gate(tokens)
        if self.training:
            self.expert_counts = torch.bincount(expert_ids.flatten(), minlength=self.config.num_experts)
        out = self.experts(tokens, expert_ids, weights).view_as(x)
        if self.config.num_shared_experts:
            out = out + self.shared_experts(x)
        return self.post_mlp_layernorm(out) if self.config.post_norm else out
