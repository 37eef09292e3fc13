"""`select_experts` on the native code and on torch against the papers' definition, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import select_experts

pytestmark = pytest.mark.usefixtures("backend")


def by_definition(
    logits: list[float], chosen: int, bias: list[float] | None, options: dict[str, Any]
) -> dict[int, float]:
    """DeepSeek-V2, section 2.1.2; DeepSeek-V3, section 2.1.2: expert -> weight."""
    experts = range(len(logits))
    if options["scoring"] == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [scores[e] + (bias[e] if bias else 0) for e in experts]
    allowed = set(experts)
    if options["group_score"] is not None:
        groups = options["num_groups"]
        size = len(logits) // groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
        best = 1 if options["group_score"] == "max" else 2
        worth = [sum(sorted((choice[e] for e in own), reverse=True)[:best]) for own in members]
        kept = sorted(range(groups), key=lambda g: -worth[g])[: options["topk_group"]]
        allowed = {e for g in kept for e in members[g]}
    ids = sorted(allowed, key=lambda e: -choice[e])[:chosen]
    total = sum(scores[e] for e in ids) if options["normalize"] else 1.0
    return {e: scores[e] / total * options["scaling"] for e in ids}


def assert_as_defined(logits: Tensor, chosen: int, bias: Tensor | None, **options: Any) -> None:
    ids, weights = select_experts(logits, chosen, correction_bias=bias, **options)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row, own_ids, own_weights in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        expected = by_definition(row, chosen, None if bias is None else bias.tolist(), options)
        assert own_ids == list(expected)
        assert own_weights == pytest.approx(list(expected.values()), rel=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 5),
    groups=st.integers(1, 4),
    size=st.integers(2, 9),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    group_score=st.sampled_from([None, "max", "top2"]),
    biased=st.booleans(),
    normalize=st.booleans(),
    data=st.data(),
)
def test_experts_and_weights_are_those_of_the_papers(
    tokens: int, groups: int, size: int, scoring: Any, group_score: Any, biased: bool, normalize: bool, data: Any
) -> None:
    topk_group = data.draw(st.integers(1, groups))
    chosen = data.draw(st.integers(1, size * (topk_group if group_score else groups)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(tokens, groups * size, generator=generator) * 2
    bias = torch.randn(groups * size, generator=generator) * 0.3 if biased else None
    assert_as_defined(
        logits,
        chosen,
        bias,
        scoring=scoring,
        group_score=group_score,
        num_groups=groups,
        topk_group=topk_group,
        normalize=normalize,
        scaling=2.5,
    )


def test_a_nan_score_still_names_experts_that_there_are() -> None:
    logits = torch.full((2, 8), float("nan"))
    ids, _ = select_experts(logits, 3, scoring="softmax")
    assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < 8


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (0, {}),
        (9, {}),
        (2, {"num_groups": 3}),
        (2, {"num_groups": 0}),
        (2, {"num_groups": -4}),
        (2, {"num_groups": 4, "topk_group": 5}),
        (2, {"num_groups": 4, "topk_group": 0}),
        (5, {"num_groups": 4, "topk_group": 2}),
        (2, {"num_groups": 8, "topk_group": 2, "group_score": "top2"}),
        (2, {"correction_bias": torch.zeros(1)}),
        (2, {"correction_bias": torch.zeros(7)}),
    ],
)
def test_what_cannot_be_chosen_is_refused(chosen: int, options: dict[str, Any]) -> None:
    with pytest.raises(OpError, match=r"select_experts takes|correction_bias has shape"):
        select_experts(torch.zeros(1, 8), chosen, scoring="sigmoid", **{"group_score": "max", **options})


def test_experts_of_other_groups_may_count_more_than_a_negative_score() -> None:
    logits, bias = torch.zeros(1, 6), torch.tensor([-0.6, -0.7, -0.8, -0.9, -1.0, -1.1])
    options: dict[str, Any] = {"scoring": "sigmoid", "group_score": "top2", "num_groups": 3, "topk_group": 1}
    chosen = {
        excluded: select_experts(logits, 2, correction_bias=bias, excluded=excluded, **options)[0].tolist()
        for excluded in (float("-inf"), 0.0)
    }
    assert chosen[float("-inf")] == [[0, 1]]
    assert set(chosen[0.0][0]) <= {2, 3, 4, 5}
