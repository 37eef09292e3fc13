"""What config.json says of experts: how many, how they are chosen, and which layers have them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from latentkv.errors import ConfigError
from latentkv.models.config import MoEConfig
from latentkv.models.fields import names_layers, shown
from latentkv.ops.swiglu_limit import SwigluLimit

if TYPE_CHECKING:
    from latentkv.models.config_reader import Fields
    from latentkv.models.families import Family


def read_moe(fields: Fields, family: Family) -> MoEConfig | None:
    """The experts of the layers that have any; None: every layer is dense.

    Raises:
        ConfigError: a field is missing, out of range or not supported.
    """
    if family.scoring is None or not fields.count("n_routed_experts"):
        return None
    experts, chosen = fields.size("n_routed_experts"), fields.size("num_experts_per_tok")
    zero_experts = fields.count("zero_expert_num")
    group_score = family.group_score
    if group_score == "topk_method":
        group_score = "max" if fields.get("topk_method") == "group_limited_greedy" else None
    groups = (fields.count("n_group") or 1) if group_score else 1
    topk_group = fields.size("topk_group") if groups > 1 else 1
    choices = experts + zero_experts
    if choices % groups or topk_group > groups or chosen > choices // groups * topk_group:
        raise ConfigError(
            f"config.json: cannot choose {chosen} of {choices} experts from {topk_group} of {groups} groups."
        )
    if group_score == "top2" and groups > 1 and choices // groups < 2:
        raise ConfigError(f"config.json: n_group={groups} leaves groups of one expert; they need two or more.")
    return MoEConfig(
        num_experts=experts,
        experts_per_token=chosen,
        intermediate_size=fields.size(family.expert_size),
        num_shared_experts=fields.count("n_shared_experts"),
        gated_shared_size=fields.count("shared_expert_intermediate_size"),
        scoring=family.scoring,
        correction_bias=family.correction_bias,
        group_score=group_score if topk_group < groups else None,
        num_groups=groups,
        topk_group=topk_group,
        excluded_score=family.excluded_score if topk_group < groups else -math.inf,
        normalize_weights=fields.flag("norm_topk_prob"),
        scaling_factor=fields.number("routed_scaling_factor"),
        post_norm=family.post_mlp_norm,
        swiglu_limit=read_swiglu_limit(fields),
        shared_swiglu_limit=None if family.limits_routed else read_swiglu_limit(fields),
        num_zero_experts=zero_experts,
        exact_router=family.exact_router,
    )


def read_swiglu_limit(fields: Fields) -> SwigluLimit | None:
    """What bounds activations of the whole model; 0 and null: nothing.

    Raises:
        ConfigError: it is no positive number.
    """
    if not fields.get("swiglu_limit"):
        return None
    return SwigluLimit(fields.positive("swiglu_limit", 0.0), bounds_gate=True)


def sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which of `num_layers` layers have experts.

    Raises:
        ConfigError: they cannot be so.
    """
    kinds = fields.get("mlp_layer_types")
    if kinds is None:
        first, every = fields.count("first_k_dense_replace"), fields.count("moe_layer_freq") or 1
        step, dense = fields.count("decoder_sparse_step") or 1, fields.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(index) is int for index in dense):
            raise ConfigError(f"config.json: mlp_only_layers must be a list of layers' numbers, not {shown(dense)}.")
        sparse = (i >= first and i % every == 0 and (i + 1) % step == 0 for i in range(num_layers))
        return tuple(is_sparse and i not in dense for i, is_sparse in enumerate(sparse))
    if not names_layers(kinds, num_layers, ("dense", "sparse")):
        raise ConfigError(
            f"config.json: mlp_layer_types must name 'dense' or 'sparse' for each of {num_layers} layers."
        )
    return tuple(kind == "sparse" for kind in kinds)
