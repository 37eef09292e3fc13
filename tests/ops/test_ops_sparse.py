"""Selecting tokens: the float64 definition, ties, and results that depend on nothing but their own row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import block_table, causal_rows, token_slots

from latentkv.errors import OpError
from latentkv.ops import (
    best_tokens,
    index_scores,
    mla_attend,
    reference,
    select_slots,
    sparse,
    weigh_heads,
    write_index_keys,
)
from latentkv.ops.index_keys import encode_keys

PAGE = 8
pytestmark = pytest.mark.usefixtures("backend")


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
            assert torch.equal(slots[slots >= 0], expected[expected >= 0])  # in order of position
            assert torch.equal((slots >= 0).sum(-1), (expected >= 0).sum(-1))


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


def long_case(rows: int, *, dtype: torch.dtype = torch.bfloat16, int8: bool = False) -> tuple[torch.Tensor, ...]:
    """Enough work for several threads; scores are not exact."""
    q, weights, pages, *layout = case([rows, 2], [1500, 1100], heads=37, dim=32, whole=False)
    pages = encode_keys(pages.flatten(0, 1)).unflatten(0, (-1, PAGE)) if int8 else pages.to(dtype)
    return q.to(dtype), weights, pages, *layout


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp32"])
def test_long_texts_give_the_same_bits_alone_and_on_any_number_of_threads(rows: int, kind: str) -> None:
    args = long_case(rows, dtype=torch.float32 if kind == "fp32" else torch.bfloat16, int8=kind == "int8")
    q, weights, pages, table, _, stop = args
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = select_slots(*args, topk=200)
        torch.set_num_threads(3)
        assert torch.equal(select_slots(*args, topk=200), expected)
    finally:
        torch.set_num_threads(threads)
    last = slice(rows - 1, rows)
    alone = select_slots(q[last], weights[last], pages, table[:1], torch.tensor([0, 1]), stop[last], topk=200)
    assert torch.equal(alone, expected[last])
    for t in (0, rows + 1):
        b = int(t >= rows)
        chosen, own = positions(expected[t], table[b]), token_slots(table, b, int(stop[t]), PAGE)
        keys = pages.flatten(0, 1)[own]
        if kind == "int8":
            keys = reference.decode_index_keys(keys)
        scores = reference.index_scores(q[t], weights[t], keys)
        left_out = torch.ones(len(scores), dtype=torch.bool).index_fill(0, chosen, False)
        slack = 0.03 if kind == "int8" else 1e-4  # of rotated queries that are rounded to bf16; of float32 sums
        assert scores[chosen].min() > scores[left_out].max() - slack * scores.abs().max()


def positions(slots: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Which tokens of the sequence with these pages lie in these slots."""
    where = {int(page): i for i, page in enumerate(pages)}
    return torch.tensor([where[slot // PAGE] * PAGE + slot % PAGE for slot in slots.tolist()])


def test_int8_keys_choose_nearly_what_bf16_keys_choose() -> None:
    exact, coded = (select_slots(*long_case(64, int8=int8), topk=200) for int8 in (False, True))
    shared = [len({*a} & {*b}) for a, b in zip(exact.tolist(), coded.tolist(), strict=True)]
    assert sum(shared) >= 0.97 * exact.numel()
    assert min(shared) >= 0.94 * 200


def test_what_is_not_a_number_is_chosen_and_zeros_of_either_sign_tie() -> None:
    q, weights, pages, table, q_start, stop = case([1], [30], heads=1, dim=4)
    slots = token_slots(table, 0, 30, PAGE)
    pages.view(-1, 4)[slots] = -1.0  # scores of -0 and 0
    pages.view(-1, 4)[slots[::2]] = 0.0
    pages.view(-1, 4)[slots[20]] = float("nan")
    pages.view(-1, 4)[slots[25]] = 1.0
    chosen = select_slots(torch.ones_like(q), -torch.ones_like(weights), pages, table, q_start, stop, topk=4)
    assert chosen.tolist() == [slots[[0, 1, 2, 20]].tolist()]


@pytest.mark.parametrize("start", [False, True])
def test_rows_that_see_few_tokens_get_the_bits_of_attention_without_slots(start: bool) -> None:
    args = case([5, 1, 4], [24, 9, 40])
    first = torch.full_like(args[-1], 2) if start else None
    slots = select_slots(*args, topk=21, start=first)
    latents = torch.randn(args[2].shape[0], PAGE, 40, generator=torch.Generator().manual_seed(1))
    q = torch.randn(10, 2, 40, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"latent_dim": 32, "scale": 0.2, "start": first}
    mixed = mla_attend(q, latents, *args[3:], slots=slots, only_longer_ranges=True, **options)
    whole = mla_attend(q, latents, *args[3:], **options)
    chosen = mla_attend(q, latents, *args[3:], slots=slots, **options)
    few = args[-1] - (0 if first is None else first) <= 21
    assert few.tolist() == [True] * (4 if start else 2) + [False] * (1 if start else 3) + [True] + [False] * 4
    for own, dense, sparse_ in zip(mixed, whole, chosen, strict=True):
        torch.testing.assert_close(own[few], dense[few], atol=1e-6, rtol=1e-6)
        assert torch.equal(own[~few], sparse_[~few])
    alone = mla_attend(
        q[5:6],
        latents,
        args[3][1:2],
        torch.tensor([0, 1]),
        args[-1][5:6],
        **options | {"start": None if first is None else first[5:6]},
    )
    assert torch.equal(mixed[0][5:6], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_keys_written_are_those_of_the_definition(
    dtype: torch.dtype, stored: torch.dtype, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(5, 40, generator=generator).to(dtype)[:, 8:]
    weight, bias = (torch.randn(32, generator=generator).to(dtype) for _ in range(2))
    angles = torch.randn(5, 6, generator=generator)
    slots = torch.tensor([17, 3, 0, 9, 22])
    pages = torch.zeros(3, PAGE, 36 if stored == torch.int8 else 32, dtype=stored)
    write_index_keys(pages, slots, k, weight, bias, 1e-6, angles.cos(), angles.sin(), interleaved=interleaved)
    rows = pages.flatten(0, 1)[slots]
    keys = reference.decode_index_keys(rows) if stored == torch.int8 else rows.double()
    expected = reference.index_keys(k, weight, bias, 1e-6, angles.cos(), angles.sin(), interleaved=interleaved)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.int8: 1.5e-2}
    largest = float(expected.abs().max())
    assert float((keys - expected).abs().max()) <= largest * max(rounding[dtype], rounding[stored])
    assert (pages.flatten(0, 1)[[1, 2, 4, 5]] == 0).all()


def test_a_key_that_is_not_finite_shows_in_int8_too() -> None:
    k = torch.ones(1, 8)
    k[0, 3] = float("nan")
    pages = torch.zeros(1, PAGE, 12, dtype=torch.int8)
    none = torch.zeros(1, 0)
    write_index_keys(pages, torch.tensor([2]), k, torch.ones(8), torch.zeros(8), 1e-6, none, none, interleaved=False)
    assert reference.decode_index_keys(pages[0, 2:3]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_heads_are_those_of_the_definition_for_each_row_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 45, generator=generator).to(dtype), torch.randn(11, 45, generator=generator)
    weights = weigh_heads(x, weight, 0.5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), 0.5 * reference.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weigh_heads(x[t : t + 1], weight, 0.5), weights[t : t + 1]) for t in range(7))
    assert weigh_heads(x[:0], weight, 0.5).shape == (0, 11)


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
        ({"key_pages": torch.zeros(9, PAGE, 16, dtype=torch.int64)}, "key_pages"),
        ({"start": torch.zeros(3, dtype=torch.int32)}, "start"),
        ({"q_start": torch.tensor([1, 4])}, "q_start"),
        ({"stop": torch.zeros(4)}, "stop"),
        ({"stop": torch.full((4,), 200)}, "pages"),
        ({"topk": 0}, "topk"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    names = ("q", "weights", "key_pages", "block_table", "q_start", "stop")
    with pytest.raises(OpError, match=named):
        select_slots(**(dict(zip(names, case([4], [21]), strict=True)) | {"topk": 3} | change))
