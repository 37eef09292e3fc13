"""Numbers that no kernel can take are refused alike on every instruction set: nothing is cut to 32 bits or rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import (
    gqa_attend,
    linear,
    mla_attend,
    mla_decode,
    mla_prefill,
    moe_experts,
    norm_rope_write,
    write_latents,
)
from latentkv.weights import pack_weight

pytestmark = pytest.mark.usefixtures("backend")

X, KV = torch.zeros(1, 2, 24), torch.zeros(3, 4, 24)
BEYOND = [2**31, 2**32 + 1, 2**40 + 1, 2**63 - 1]
BELOW = [-1, -(2**31), -(2**31) - 1, -(2**32), -(2**32) + 1, -(2**63)]


def integers(*values: Any) -> Tensor:
    return torch.tensor(values)


def attend(**changed: Any) -> tuple[Tensor, Tensor]:
    """One row over 4 tokens of page 1 (of 3 pages of 4 latents), but for what is changed."""
    gen = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "q": torch.randn(1, 2, 24, generator=gen),
        "kv_pages": torch.randn(3, 4, 24, generator=gen),
        "block_table": integers([1]),
        "q_start": integers(0, 1),
        "stop": integers(4),
        "latent_dim": 16,
        "scale": 0.1,
    }
    return mla_attend(**options | changed)


@pytest.mark.parametrize("page", BEYOND + BELOW)
def test_a_page_that_the_cache_does_not_have_is_refused_whatever_it_is_cut_to(page: int) -> None:
    with pytest.raises(OpError, match=f"page {page} is not one of the cache's 3"):
        attend(block_table=integers([page]))
    kv = torch.randn(3, 4, 2, 1, 8)
    with pytest.raises(OpError, match=f"page {page} is not one of the cache's 3"):
        gqa_attend(torch.randn(1, 2, 8), kv, integers([page]), integers(0, 1), integers(4), scale=0.1)


@pytest.mark.parametrize("stop", BEYOND)
def test_a_stop_beyond_the_pages_is_refused_whatever_it_is_cut_to(stop: int) -> None:
    with pytest.raises(OpError, match=r"tokens 0 to .* lie outside the 1 pages of 4 tokens"):
        attend(stop=integers(stop))
    with pytest.raises(OpError, match="lie outside the 1 pages of 4 tokens"):
        mla_decode(X[None], KV, integers([1]), integers(stop), latent_dim=16, scale=1)


@pytest.mark.parametrize("start", BELOW)
def test_a_start_below_zero_is_refused(start: int) -> None:
    with pytest.raises(OpError, match="lie outside the 1 pages"):
        attend(start=integers(start))


@pytest.mark.parametrize("slots", [None, integers([0])])
@pytest.mark.parametrize("bounds", [[0, 2**32 + 1], [2**32, 1], [-(2**31), 1], [1, 1], [0, 0]])
def test_rows_that_are_not_those_of_q_are_refused_with_slots_too(bounds: list[int], slots: Tensor | None) -> None:
    with pytest.raises(OpError, match="q_start must rise from 0 to the 1 rows of q"):
        attend(q_start=integers(*bounds), slots=slots)


@pytest.mark.parametrize("slot", [12, *BEYOND])
def test_a_slot_beyond_the_cache_is_refused_whatever_it_is_cut_to(slot: int) -> None:
    with pytest.raises(OpError, match="row 0 names a cache slot past the last, 11"):
        attend(slots=integers([0, slot]))


@pytest.mark.parametrize("slot", BELOW)
def test_any_negative_slot_is_unused(slot: int) -> None:
    out, lse = attend(slots=integers([slot, slot]))
    assert out.tolist() == torch.zeros(1, 2, 16).tolist()
    assert lse.tolist() == [[-float("inf")] * 2]
    torch.testing.assert_close(attend(slots=integers([5, slot])), attend(slots=integers([5])), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unread", BEYOND + BELOW)
def test_what_no_row_reads_may_be_any_integer(unread: int) -> None:
    torch.testing.assert_close(attend(block_table=integers([1, unread])), attend(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [2, 24])
def test_a_row_that_reads_nothing_may_name_the_least_and_largest_numbers(dtype: torch.dtype, heads: int) -> None:
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    q, pages = torch.randn(5, heads, 24), torch.randn(20, 16, 24)
    start = torch.tensor([least, 200, most, 0, 250], dtype=dtype)
    stop = torch.tensor([least, 300, most, least, 260], dtype=dtype)
    table, q_start = torch.arange(20, dtype=dtype)[None], torch.tensor([0, 5], dtype=dtype)
    out, lse = mla_attend(q, pages, table, q_start, stop, latent_dim=16, scale=0.1, start=start)
    assert out[[0, 2, 3]].abs().sum() == 0
    assert lse[[0, 2, 3]].isneginf().all()
    for row in (1, 4):
        alone = mla_attend(
            q[row : row + 1], pages, table, q_start.clamp(max=1), stop[row : row + 1], latent_dim=16, scale=0.1,
            start=start[row : row + 1],
        )  # fmt: skip
        torch.testing.assert_close((out[row : row + 1], lse[row : row + 1]), alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_below_zero_read_nothing_down_to_the_least_number(dtype: torch.dtype) -> None:
    q, pages = torch.randn(1, 3, 2, 24), torch.randn(3, 4, 24)
    for length in (torch.iinfo(dtype).min, -1, 0):
        lens = torch.tensor([length], dtype=dtype)
        out, lse = mla_decode(q, pages, integers([1]), lens, latent_dim=16, scale=0.1)
        assert out.abs().sum() == 0
        assert lse.isneginf().all()


def test_a_window_at_the_largest_token_number_is_read_as_anywhere_else() -> None:
    """2^31 - 1 tokens, of which the last 5 are read: counting chunks and tiles must not run over."""
    page_size = 2**20
    pages = torch.randn(1, 1, 4).expand(1, page_size, 4).clone()
    pages[0, -6:] = torch.randn(6, 4)
    most = 2**31 - 1
    table = torch.zeros(1, 2**11, dtype=torch.int32)  # page 0 again and again
    args = torch.ones(1, 2, 4), pages
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    stop, start = (torch.tensor([n], dtype=torch.int32) for n in (most, most - 5))
    far = mla_attend(*args, table, bounds, stop, latent_dim=2, scale=0.1, start=start)
    near_stop, near_start = (torch.tensor([n], dtype=torch.int32) for n in (page_size - 1, page_size - 6))
    near = mla_attend(*args, table[:, :1], bounds, near_stop, latent_dim=2, scale=0.1, start=near_start)
    torch.testing.assert_close(far, near, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("slot", BEYOND + BELOW)
def test_tokens_are_written_to_no_other_slot_than_the_one_named(slot: int) -> None:
    pages = torch.zeros(3, 4, 24)
    with pytest.raises(OpError, match=f"slot {slot} is not one of the cache's 12"):
        write_latents(pages, integers(1, slot), torch.ones(2, 16), torch.ones(2, 8))
    with pytest.raises(OpError, match=f"slot {slot} is not one of the cache's 12"):
        angles = torch.ones(2, 4), torch.ones(2, 4)
        norm_rope_write(pages, integers(1, slot), torch.ones(2, 24), torch.ones(16), 1e-6, *angles, interleaved=True)
    assert not pages.any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("expert", [3, *BEYOND, *BELOW])
def test_an_expert_that_there_is_not_is_refused_before_anything_is_counted(packed: bool, expert: int) -> None:
    gate_up, down = torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    weights = (pack_weight(gate_up), pack_weight(down)) if packed else (gate_up, down)
    with pytest.raises(OpError, match=f"expert_ids name expert {expert}"):
        moe_experts(torch.randn(1, 8), integers([0, expert]), torch.ones(1, 2), *weights)


EXPERTS = torch.ones(2, 16, 8), torch.ones(2, 8, 8)
NOT_INTEGERS: dict[str, Callable[[Tensor], Any]] = {
    "block_table": lambda n: attend(block_table=n[:, None]),
    "q_start": lambda n: attend(q_start=torch.cat([n * 0, n])),
    "stop": lambda n: attend(stop=n),
    "start": lambda n: attend(start=n),
    "slots": lambda n: attend(slots=n[:, None]),
    "kv_lens": lambda n: mla_decode(X[None], KV, integers([1]), n, latent_dim=16, scale=1),
    "kv_start": lambda n: mla_prefill(X, X, X, integers(0, 1), torch.cat([n * 0, n]), scale=1),
    "expert_ids": lambda n: moe_experts(torch.ones(1, 8), n[:, None], torch.ones(1, 1), *EXPERTS),
}


@pytest.mark.parametrize("name", NOT_INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_numbers_that_are_not_integers_are_not_rounded_to_some(name: str, dtype: torch.dtype) -> None:
    numbers = torch.ones(1).to(dtype)
    if dtype == torch.bool and name in ("q_start", "kv_start"):
        numbers = numbers.to(torch.float16)  # a bool times 0 is none
    with pytest.raises(OpError, match=f"{name} must be integers, not {numbers.dtype}"):
        NOT_INTEGERS[name](numbers)


def test_dtypes_that_cannot_be_multiplied_are_named_both() -> None:
    x, weight = torch.ones(2, 8), torch.ones(16, 8)
    with pytest.raises(OpError, match=r"linear .*x is torch.bfloat16, weight is torch.float32"):
        linear(x.bfloat16(), weight)
    with pytest.raises(OpError, match=r"x is torch.float32, weight is torch.float32, bias is torch.float16"):
        linear(x, weight, torch.ones(16).half())
    ids, experts = integers([0], [1]), (torch.ones(2, 16, 8).half(), torch.ones(2, 8, 8))
    with pytest.raises(OpError, match=r"gate_up is torch.float16, down is torch.float32"):
        moe_experts(x, ids, torch.ones(2, 1), *experts)
    with pytest.raises(OpError, match=r"q must be float64, float32, bf16 or fp16, not torch.float8_e4m3fn"):
        attend(q=torch.ones(1, 2, 24).to(torch.float8_e4m3fn))
    with pytest.raises(OpError, match=r"out must be .* not torch.int32"):
        attend(out=torch.zeros(1, 2, 16, dtype=torch.int32))
    with pytest.raises(OpError, match=r"bias must be .* not torch.int64"):
        linear(x, pack_weight(weight), integers(*range(16)))


def test_float_dtypes_may_differ_where_numbers_are_stored_and_added() -> None:
    """bf16 queries read a float32 cache; a float64 bias is added to packed products."""
    q, pages = torch.randn(1, 2, 24).bfloat16(), torch.randn(3, 4, 24)
    out, _ = attend(q=q, kv_pages=pages)
    expected, _ = attend(q=q.double(), kv_pages=pages.double())
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    bias = torch.full((4,), 0.5, dtype=torch.float64)
    assert linear(torch.eye(4), pack_weight(torch.eye(4)), bias).tolist() == (torch.eye(4) + 0.5).tolist()
