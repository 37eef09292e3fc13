"""Keys of pools of tokens: their definition, however tokens are cut into steps, and what is selected by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import block_table, causal_rows, token_slots
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import reference, select_slots, write_pooled_keys

pytestmark = pytest.mark.usefixtures("backend")
PAGE, DIM, EPS = 8, 16, 1e-6


class Text:
    """One sequence whose keys are written in steps into a cache that held garbage."""

    def __init__(self, pool: int, *, ring: int = 0, dtype: torch.dtype = torch.float32, int8: bool = False) -> None:
        generator = torch.Generator().manual_seed(pool)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.pool, self.table = pool, block_table([40], PAGE, 1)[0]
        self.slots = token_slots(self.table, 0, 40, PAGE)
        self.k, self.gate = numbers(40, DIM).to(dtype), numbers(40, DIM).to(dtype)
        self.norm, self.ape = (numbers(DIM).to(dtype), numbers(DIM).to(dtype)), numbers(pool, DIM)
        pages = int(self.table[0, :5].max()) + 1
        width, stored = (DIM + 4, torch.int8) if int8 else (DIM, dtype)
        self.pages = torch.full((pages, PAGE // pool, width), 77).to(stored)
        self.rings = torch.full((pages, ring or pool, 2 * DIM), float("nan"), dtype=dtype)

    def write(self, first: int, last: int, *, wrong: bool = False) -> None:
        own = slice(first, last)
        k = self.k[own] + 3 if wrong else self.k[own]
        write_pooled_keys(self.pages, self.rings, self.slots[own], k, self.gate[own], *self.norm, EPS, self.ape)

    def keys(self, count: int) -> Tensor:
        """The keys of the whole pools of the first tokens, as they are stored."""
        places = self.slots[: count // self.pool * self.pool : self.pool] // self.pool
        return self.pages.flatten(0, 1)[places]


@pytest.mark.parametrize("pool", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_has_the_key_of_the_definition(dtype: torch.dtype, pool: int) -> None:
    text = Text(pool, dtype=dtype)
    text.write(0, 39)
    none = torch.zeros(40, 0)
    normed = reference.index_keys(text.k, *text.norm, EPS, none, none, interleaved=False)
    expected = reference.pooled_index_keys(normed[:39].to(dtype), text.gate[:39], text.ape)
    bar = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(text.keys(39).double(), expected, **bar)
    assert pool in (1, 8) or (text.pages[int(text.table[0, 4]), -1] == 77).all()  # of a pool that is not whole


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("pool", [2, 4, 8])
def test_tokens_cut_anywhere_give_the_same_bits(pool: int, int8: bool) -> None:
    whole, cut, one = (Text(pool, int8=int8) for _ in range(3))
    whole.write(0, 40)
    for first, last in ((0, 3), (3, 4), (4, 17), (17, 25), (25, 40)):
        cut.write(first, last)
    for t in range(40):
        one.write(t, t + 1)
    assert torch.equal(cut.keys(40), whole.keys(40)) and torch.equal(one.keys(40), whole.keys(40))


def test_int8_keys_are_the_rounded_keys_of_floats() -> None:
    floats, codes = Text(4), Text(4, int8=True)
    floats.write(0, 40)
    codes.write(0, 40)
    torch.testing.assert_close(reference.decode_index_keys(codes.keys(40)).float(), floats.keys(40), atol=0.03, rtol=0)


@pytest.mark.parametrize("draft", [1, 2, 3, 5])
def test_drafts_that_are_wrong_leave_no_trace_in_a_ring_that_has_room_for_them(draft: int) -> None:
    text, expected = Text(4, ring=4 + draft), Text(4)
    expected.write(0, 40)
    for t in range(40 - draft):
        text.write(t, t + 1)
        text.write(t + 1, t + 1 + draft, wrong=True)
    text.write(40 - draft, 40)
    assert torch.equal(text.keys(40), expected.keys(40))


def test_sequences_that_are_written_together_do_not_touch_each_other() -> None:
    one, other = Text(4), Text(4)
    for text, lengths in ((one, (7, 20)), (other, (13, 9))):
        for length in lengths:
            text.write(0, length)
    table, pages = block_table([27, 22], PAGE, 3)
    keys, rings = torch.zeros(pages, 2, DIM), torch.full((pages, 4, 2 * DIM), float("nan"))
    for first, last in (((0, 0), (7, 13)), ((7, 13), (27, 22))):
        rows = [slice(a, b) for a, b in zip(first, last, strict=True)]
        slots = torch.cat([token_slots(table, b, 27, PAGE)[own] for b, own in enumerate(rows)])
        k, gate = (torch.cat([t[own] for own in rows]) for t in (one.k, one.gate))
        write_pooled_keys(keys, rings, slots, k, gate, *one.norm, EPS, one.ape)
    one.write(0, 27)
    for b, count in ((0, 27), (1, 22)):
        places = token_slots(table, b, 27, PAGE)[: count // 4 * 4 : 4] // 4
        assert torch.equal(keys.flatten(0, 1)[places], one.keys(count))


def expected_slots(args: tuple[Tensor, ...], *, topk: int, pool: int, open_pool: bool) -> list[list[int]]:
    """Row by row: the tokens of the best pools by the definition, then those after the last whole one."""
    q, weights, pages, table, q_start, stop = args
    by_pools = [t // pool for t in stop.tolist()]
    best = reference.select_slots(q, weights, pages, table, q_start, torch.tensor(by_pools), topk=topk // pool)
    rows: list[list[int]] = []
    for t, chosen in enumerate(best.tolist()):
        b = int((q_start <= t).sum()) - 1
        slots = [place * pool + i for place in chosen if place >= 0 for i in range(pool)]
        tail = range(by_pools[t] * pool, int(stop[t])) if open_pool else ()
        rows.append([*slots, *(int(table[b, s // PAGE]) * PAGE + s % PAGE for s in tail)])
    return rows


@settings(deadline=None, max_examples=40)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=2),
    pool=st.sampled_from([2, 4, 8]),
    pools=st.integers(1, 5),
    open_pool=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_slots_are_those_of_the_best_whole_pools_and_of_the_open_one(
    sequences: list[tuple[int, int]], pool: int, pools: int, open_pool: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_lens, kv_lens = [new for new, _ in sequences], [new + past for new, past in sequences]
    table, num_pages = block_table(kv_lens, PAGE, seed)
    keys = torch.randn(num_pages, PAGE // pool, DIM, generator=generator).round()  # scores are exact, many equal
    rows = sum(q_lens)
    q, weights = (torch.randn(rows, *shape, generator=generator).round() for shape in ((3, DIM), (3,)))
    args = q, weights, keys, table, *causal_rows(q_lens, kv_lens)
    options: dict[str, Any] = {"topk": pools * pool, "pool": pool, "open_pool": open_pool}
    slots = select_slots(*args, **options)
    assert slots.shape == (rows, pools * pool + (pool - 1 if open_pool else 0)) and slots.dtype == torch.int32
    for row, expected in zip(slots.tolist(), expected_slots(args, **options), strict=True):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {-1}


def test_arguments_that_do_not_fit_are_refused() -> None:
    text = Text(4)
    arguments = text.slots, text.k, text.gate, *text.norm, EPS
    with pytest.raises(OpError, match="ring of 3 tokens"):
        write_pooled_keys(text.pages, text.rings[:, :3].contiguous(), *arguments, text.ape)
    with pytest.raises(OpError, match="gate has shape"):
        write_pooled_keys(text.pages, text.rings, text.slots, text.k, text.gate[1:], *text.norm, EPS, text.ape)
    with pytest.raises(OpError, match="is not one of the cache's"):
        write_pooled_keys(text.pages, text.rings, text.slots + 999, *arguments[1:], text.ape)
    q, weights = torch.zeros(1, 3, DIM), torch.zeros(1, 3)
    layout = text.table, torch.tensor([0, 1]), torch.tensor([9])
    with pytest.raises(OpError, match="whole pools of 4 tokens"):
        select_slots(q, weights, text.pages, *layout, topk=6, pool=4)
    with pytest.raises(OpError, match="leave start out"):
        select_slots(q, weights, text.pages, *layout, topk=8, pool=4, start=torch.tensor([1]))
