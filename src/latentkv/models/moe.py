"""Mixture of experts: the router, and the block of routed and shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv import ops
from latentkv.models.config import MoEConfig
from latentkv.models.layers import MLP, RMSNorm
from latentkv.models.packing import Packer
from latentkv.models.shard import Team
from latentkv.weights import PackedWeight


class Router(nn.Module):
    """Scores tokens against experts, in float32 whatever the model's dtype."""

    packed: PackedWeight | None = None
    is_packed: bool = False

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_choices, hidden_size))
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(config.num_choices, dtype=torch.float32) if config.correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> expert ids [T, K] and weights [T, K] float32."""
        if self.packed is not None:
            logits = ops.linear(x, self.packed, out_dtype=torch.float32)
        elif self.is_packed:
            logits = ops.weigh_heads(x, self.weight, 1.0)
        else:
            with torch.autocast(x.device.type, enabled=False):
                logits = functional.linear(x.float(), self.weight.float())
        config = self.config
        return ops.select_experts(
            logits,
            config.experts_per_token,
            scoring=config.scoring,
            correction_bias=self.e_score_correction_bias,
            group_score=config.group_score,
            num_groups=config.num_groups,
            topk_group=config.topk_group,
            excluded=config.excluded_score,
            normalize=config.normalize_weights,
            scaling=config.scaling_factor,
        )

    def pack(self, packer: Packer) -> None:
        """See `Packable`; a float32 router stays as it is, for packing would round it."""
        if self.weight.dtype == torch.bfloat16:
            self.packed = packer("weight")
        elif self.config.exact_router:
            self.weight = nn.Parameter(packer.plain("weight").to(self.weight.dtype), requires_grad=False)
            self.is_packed = True


class Experts(nn.Module):
    """The routed experts' weights, stacked, as trained or packed for inference.

    The result has `out_dtype`, or x's dtype.
    """

    gate_up: PackedWeight | None = None
    down: PackedWeight | None = None
    out_dtype: torch.dtype | None = None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        experts, width = config.num_experts, config.intermediate_size
        self.limit = config.swiglu_limit
        self.num_zero_experts = config.num_zero_experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, hidden] -> weighted sum of each token's experts, [T, hidden], plus the residual."""
        gate_up = self.gate_up_proj if self.gate_up is None else self.gate_up
        down = self.down_proj if self.down is None else self.down
        return ops.moe_experts(
            x,
            expert_ids,
            weights,
            gate_up,
            down,
            residual=residual,
            limit=self.limit,
            num_zero_experts=self.num_zero_experts,
            out_dtype=self.out_dtype,
        )

    def pack(self, packer: Packer) -> None:
        """See `Packable`."""
        self.gate_up, self.down = packer("gate_up_proj"), packer("down_proj")


class MoE(nn.Module):
    """Routed experts plus shared ones (DeepSeekMoE, arXiv 2401.06066).

    In training, `expert_counts` [E] int64 holds how many tokens the last forward sent to each expert, zero experts
    included (None before it).

    Attributes:
        team: the processes whose shards of these experts add up, where there are several.
    """

    team: Team | None = None

    def __init__(self, hidden_size: int, config: MoEConfig, *, norm_eps: float, bias: bool = False) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)
        if config.num_shared_experts:
            width = config.intermediate_size * config.num_shared_experts
            self.shared_experts = MLP(hidden_size, width, bias=bias, limit=config.shared_swiglu_limit)
        if config.gated_shared_size:
            self.shared_expert = MLP(hidden_size, config.gated_shared_size, bias=bias)
            self.shared_expert_gate = Router(hidden_size, MoEConfig(1, 1, config.gated_shared_size))
        if config.post_norm:
            self.post_mlp_layernorm = RMSNorm(hidden_size, norm_eps)
        self.config = config
        self.expert_counts: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., hidden] -> [..., hidden], plus the residual."""
        tokens = x.flatten(0, -2)
        expert_ids, weights = self.gate(tokens)
        if self.training:
            self.expert_counts = torch.bincount(expert_ids.flatten(), minlength=self.config.num_choices)
        # What the experts' products are added to, in one sum: the shared experts', and the residual if no norm follows.
        base = None if self.config.post_norm or self.team is not None else residual
        if self.config.num_shared_experts:
            base = self.shared_experts(x, base)
        if self.config.gated_shared_size:
            base = self._gated_shared(tokens, None if base is None else base.view_as(tokens))
        out = self.experts(tokens, expert_ids, weights, None if base is None else base.view_as(tokens)).view_as(x)
        if self.team is not None:
            out = self.team.combine(out, None if self.config.post_norm else residual, x.dtype)
        if not self.config.post_norm:
            return out
        normed = self.post_mlp_layernorm(out)
        return normed if residual is None else normed + residual

    def _gated_shared(self, tokens: Tensor, residual: Tensor | None) -> Tensor:
        """[T, hidden] -> the gated shared expert's, [T, hidden]: the one expert of a router that has no other."""
        expert_ids, weights = self.shared_expert_gate(tokens)
        gate_up, down = self.shared_expert.gate_up, self.shared_expert.down
        if gate_up is not None and down is not None:
            out_dtype = self.shared_expert.out_dtype
            return ops.moe_experts(tokens, expert_ids, weights, gate_up, down, residual=residual, out_dtype=out_dtype)
        out = self.shared_expert(tokens)
        out = out * weights.to(out.dtype)
        return out if residual is None else out + residual
