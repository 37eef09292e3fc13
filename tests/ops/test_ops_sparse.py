"""Selecting tokens: the float64 definition, ties, and results that depend on nothing but their own row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import block_table, causal_rows, token_slots

from latentkv.errors import OpError
from latentkv.ops import best_tokens, index_scores, mla_attend, reference, select_slots, sparse

PAGE = 8


def case(
    q_lens: list[int], kv_lens: list[int], *, heads: int = 3, dim: int = 16, whole: bool = True, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Arguments of `select_slots`; of whole numbers every score is exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.round() if whole else values

    table, num_pages = block_table(kv_lens, PAGE, seed)
    pages = torch.full((num_pages, PAGE, dim), float("nan"))
    for b, length in enumerate(kv_lens):
        pages.view(-1, dim)[token_slots(table, b, length, PAGE)] = numbers(length, dim)
    rows = sum(q_lens)
    return numbers(rows, heads, dim), numbers(rows, heads), pages, table, *causal_rows(q_lens, kv_lens)


@settings(deadline=None, max_examples=40)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=2),
    heads=st.integers(1, 5),
    topk=st.integers(1, 20),
    first=st.integers(0, 6),
    block=st.sampled_from([1, 50, 1 << 22]),
    seed=st.integers(0, 99),
)
def test_the_slots_are_those_of_the_definition(
    sequences: list[tuple[int, int]], heads: int, topk: int, first: int, block: int, seed: int
) -> None:
    args = case([new for new, _ in sequences], [new + past for new, past in sequences], heads=heads, seed=seed)
    start = torch.full((len(args[0]),), first).minimum(args[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "CHUNK_TOKENS", 16)
        patch.setattr(sparse, "SCORE_NUMBERS", block)
        for options in ({"topk": topk}, {"topk": topk, "start": start}):
            slots, expected = select_slots(*args, **options), reference.select_slots(*args, **options)
            assert slots.dtype == torch.int32
            assert torch.equal(slots.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_those_of_the_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 4, 24), (30, 24)))
    weights = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    stop = [30, 40, 7, 0, -3]
    scores = index_scores(q, weights, keys, stop)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for t, end in enumerate(stop):
        seen = max(0, min(end, 30))
        torch.testing.assert_close(
            scores[t, :seen].double(), reference.index_scores(q[t], weights[t], keys[:seen]), atol=1e-5, rtol=1e-5
        )
        assert (scores[t, seen:] == float("-inf")).all()


def test_a_row_selects_the_same_alone_and_in_any_batch() -> None:
    q, weights, pages, table, q_start, stop = case([20, 3], [70, 61], dim=24, whole=False)
    together = select_slots(q, weights, pages, table, q_start, stop, topk=9)
    bounds = torch.tensor([0, 1])
    for t in range(23):
        own, b = slice(t, t + 1), int(t >= 20)
        alone = select_slots(q[own], weights[own], pages, table[b : b + 1], bounds, stop[own], topk=9)
        assert torch.equal(alone, together[own])
    keys = pages.view(-1, 24)[token_slots(table, 0, 70, PAGE)]
    scores = index_scores(q, weights, keys, [70] * 23)
    assert all(torch.equal(index_scores(q[t : t + 1], weights[t : t + 1], keys, [70])[0], scores[t]) for t in range(23))


def test_attention_to_all_slots_is_attention_to_the_range() -> None:
    args = case([4], [21])
    slots = select_slots(*args, topk=21)
    latents = torch.randn(args[2].shape[0], PAGE, 40, generator=torch.Generator().manual_seed(1))
    q = torch.randn(4, 2, 40, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"latent_dim": 32, "scale": 0.2}
    whole = mla_attend(q, latents, *args[3:], **options)
    torch.testing.assert_close(mla_attend(q, latents, *args[3:], slots=slots, **options), whole)


def test_the_best_tokens_are_counted_and_earlier_ones_win_ties() -> None:
    scores = torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, float("nan"), 7, float("-inf"), float("inf")]])
    chosen = best_tokens(scores, 2)
    assert chosen.tolist() == [
        [False, True, True, False, False],
        [True, True, False, False, False],
        [False, True, False, False, True],
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": torch.zeros(4, 2)}, "weights"),
        ({"key_pages": torch.zeros(9, PAGE, 15)}, "key_pages"),
        ({"key_pages": torch.zeros(9, PAGE, 16, dtype=torch.int8)}, "key_pages"),
        ({"stop": torch.zeros(4)}, "stop"),
        ({"stop": torch.full((4,), 200)}, "pages"),
        ({"topk": 0}, "topk"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    names = ("q", "weights", "key_pages", "block_table", "q_start", "stop")
    with pytest.raises(OpError, match=named):
        select_slots(**(dict(zip(names, case([4], [21]), strict=True)) | {"topk": 3} | change))
