"""`mla_attend` and `mla_decode` on every instruction set against the float64 reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import Paged, assert_meets_bar, mla_case, token_slots
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import KVFormat, mla_attend, mla_decode, reference

pytestmark = pytest.mark.usefixtures("backend")

HEADS = [1, 3, 9, 16, 20, 40, 63, 64, 126, 128]
STEPS = [1, 2, 3, 4, 17]
RANKS = [64, 256, 512]
FORMATS: list[KVFormat | None] = [None, "int8", "fp8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every two of three meet: heads and rows choose a kernel, which loops over the rest.
SHAPES = [(heads, steps, RANKS[(i + j) % 3]) for i, heads in enumerate(HEADS) for j, steps in enumerate(STEPS)]


def assert_matches_reference(case: Paged, latent_dim: int, scale: float = 0.1, **rows: Any) -> None:
    options = {"latent_dim": latent_dim, "scale": scale, "kv_format": case.kv_format, **rows}
    assert_meets_bar(mla_attend(*case.args, **options), reference.mla_attend(*case.args, **options))


@cache
def shape_case(heads: int, steps: int, rank: int) -> tuple[Paged, tuple[Tensor, Tensor]]:
    """A case, and the reference's result: the same for every instruction set."""
    case = mla_case([steps] * 3, [steps, 33, 70], heads=heads, latent_dim=rank, rope_dim=64, page_size=32, seed=heads)
    return case, reference.mla_attend(*case.args, latent_dim=rank, scale=(rank + 64) ** -0.5)


@cache
def long_case() -> tuple[Paged, tuple[Tensor, Tensor]]:
    """Likewise, of several chunks and blocks of rows."""
    case = mla_case([70, 1], [2300, 1025], heads=128, latent_dim=16, rope_dim=8, page_size=48, dtype=torch.float32)
    return case, reference.mla_attend(*case.args, latent_dim=16, scale=3.0)


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize(("heads", "steps", "rank"), SHAPES)
def test_mla_attend_meets_the_bar_on_every_shape(heads: int, steps: int, rank: int) -> None:
    case, expected = shape_case(heads, steps, rank)
    assert_meets_bar(mla_attend(*case.args, latent_dim=rank, scale=(rank + 64) ** -0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mla_attend_takes_every_float_dtype_and_a_peaked_softmax(dtype: torch.dtype) -> None:
    case = mla_case([2, 5], [40, 61], heads=5, dtype=dtype)
    assert_matches_reference(case, 64, scale=30.0)
    assert mla_attend(*case.args, latent_dim=64, scale=1.0)[0].dtype == dtype


@pytest.mark.parametrize("page_size", [1, 3, 7, 16])
def test_mla_attend_reads_every_length_from_one_token_to_a_page_and_one(page_size: int) -> None:
    lens = list(range(1, page_size + 2))
    assert_matches_reference(mla_case([1] * len(lens), lens, heads=3, page_size=page_size), 64)


def test_float32_results_are_accurate_to_float32_over_several_chunks_and_blocks() -> None:
    case, (expected, expected_lse) = long_case()
    out, lse = mla_attend(*case.args, latent_dim=16, scale=3.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize(
    ("kv_format", "dtype", "latent_dim", "rope_dim"),
    [  # every two meet
        (("int8", "fp8")[(i + j) % 2], dtype, *dims)
        for i, dtype in enumerate(DTYPES)
        for j, dims in enumerate([(512, 64), (256, 32), (160, 20), (44, 9), (128, 0)])
    ],
)
def test_quantised_pages_are_read_as_the_numbers_that_they_stand_for(
    kv_format: KVFormat, dtype: torch.dtype, latent_dim: int, rope_dim: int
) -> None:
    shape = {"latent_dim": latent_dim, "rope_dim": rope_dim, "page_size": 24}
    case = mla_case([3, 1, 20], [150, 2100, 77], heads=16, dtype=dtype, kv_format=kv_format, **shape)
    # Some kernels round what int8 stands for to bf16, which the bar allows at the scale of a real softmax.
    scale = 2.0 if dtype == torch.float32 else (latent_dim + rope_dim) ** -0.5
    assert_matches_reference(case, latent_dim, scale)
    slots = torch.full((24, 30), -1)
    slots[5, ::2] = token_slots(case.table, 2, 77, 24)[10:25]
    assert_matches_reference(case, latent_dim, scale, slots=slots)


@pytest.mark.parametrize("heads", [5, 12])
def test_fp8_pages_may_have_scales_that_are_not_powers_of_two_and_codes_of_every_kind(heads: int) -> None:
    case = mla_case([2], [256], heads=heads, latent_dim=256, rope_dim=32, page_size=64, kv_format="fp8")
    rows = case.pages.view(-1, case.pages.shape[2])[token_slots(case.table, 0, 256, 64)]
    codes = torch.arange(256, dtype=torch.uint8).masked_fill(torch.arange(256) % 128 == 127, 0)  # without NaN
    rows[:, :256] = codes.roll(13)
    scales = torch.tensor([2.0**-7, 3e-3]).repeat(128, 1)
    scales[0], scales[1] = torch.tensor([2.0**-130, 1.5]), torch.tensor([0.0, 2.0**-126])
    rows[:, 256:264] = torch.cat([scales, scales.flip(1)]).view(torch.uint8)
    case.pages.view(-1, case.pages.shape[2])[token_slots(case.table, 0, 256, 64)] = rows
    assert_matches_reference(case, 256, 0.02)


@pytest.mark.parametrize(
    ("heads", "kv_format", "value", "tokens"),
    [  # every two meet
        (heads, kv_format, (float("nan"), float("inf"))[(i + j) % 2], (1, 30)[(i + j) % 4 // 2])
        for i, heads in enumerate([4, 8, 16, 24])
        for j, kv_format in enumerate(FORMATS)
    ],
)
def test_a_query_that_is_not_finite_shows(heads: int, kv_format: KVFormat | None, value: float, tokens: int) -> None:
    case = mla_case([1], [tokens], heads=heads, rope_dim=32, kv_format=kv_format)
    options: dict[str, Any] = {"latent_dim": 64, "scale": 0.1, "kv_format": kv_format}
    for number in range(8):  # of both signs in the key: scores of +inf and of -inf
        q = case.q.clone()
        q[0, 1, number] = value
        out, lse = mla_attend(q, *case.args[1:], **options)
        assert out[0, 1].isnan().all()
        assert not lse[0, 1].isfinite()
        assert out[0, 0].isfinite().all()


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize(
    ("heads", "latent_dim", "rope_dim", "kv_format"),
    [  # every two meet
        (heads, *dims, FORMATS[(i + j) % 3])
        for i, heads in enumerate([8, 9, 24, 25, 40, 120])
        for j, dims in enumerate([(512, 64), (256, 32), (192, 64), (64, 0), (96, 32)])
    ],
)
def test_any_number_of_heads_meets_the_bar_in_every_format(
    heads: int, latent_dim: int, rope_dim: int, kv_format: KVFormat | None
) -> None:
    shape = {"latent_dim": latent_dim, "rope_dim": rope_dim, "page_size": 24}
    case = mla_case([1, 3, 2], [131, 300, 9], heads=heads, kv_format=kv_format, **shape)
    assert_matches_reference(case, latent_dim, (latent_dim + rope_dim) ** -0.5)


def test_a_sequence_without_tokens_or_rows_gives_zero_and_minus_infinity() -> None:
    case = mla_case([1, 3, 0, 2], [0, 2, 9, 5], heads=2)
    out, lse = mla_attend(*case.args, latent_dim=64, scale=0.1)
    assert out[:2].abs().sum() == 0
    assert torch.isneginf(lse[:2]).all()
    assert_matches_reference(case, 64)


def test_no_rows_at_all_give_an_empty_result() -> None:
    case = mla_case([], [], heads=2)
    out, lse = mla_attend(*case.args, latent_dim=64, scale=0.1)
    assert out.shape == (0, 2, 64)
    assert lse.shape == (0, 2)


@pytest.mark.parametrize("window", [1, 5, 24])
@pytest.mark.parametrize(("heads", "rope_dim"), [(3, 16), (24, 32)])
def test_sliding_windows_read_only_their_tokens(window: int, heads: int, rope_dim: int) -> None:
    case = mla_case([4, 1, 40], [30, 3, 45], heads=heads, rope_dim=rope_dim)
    start = (case.stop - window).clamp(min=0)
    for t, b in enumerate(torch.repeat_interleave(torch.arange(3), torch.tensor([4, 1, 40])).tolist()):
        if t == int(case.q_start[b]):  # the first row's window starts first: all before it is poisoned
            case.pages.view(-1, 64 + rope_dim)[token_slots(case.table, b, int(start[t]), 16)] = float("nan")
    assert_matches_reference(case, 64, start=start)


@pytest.mark.parametrize(("heads", "rope_dim"), [(2, 16), (24, 32)])
def test_tokens_that_no_row_reads_may_be_nan_even_between_rows(heads: int, rope_dim: int) -> None:
    case = mla_case([3], [30], heads=heads, rope_dim=rope_dim)
    start, stop = torch.tensor([0, 20, 25]), torch.tensor([5, 30, 25])
    case.pages.view(-1, 64 + rope_dim)[token_slots(case.table, 0, 30, 16)[5:20]] = float("nan")
    args = (*case.args[:4], stop)
    expected = reference.mla_attend(*args, latent_dim=64, scale=0.1, start=start)
    assert_meets_bar(mla_attend(*args, latent_dim=64, scale=0.1, start=start), expected)


@pytest.mark.parametrize(("heads", "rope_dim"), [(3, 16), (24, 32)])
def test_slots_name_the_tokens_to_read(heads: int, rope_dim: int) -> None:
    case = mla_case([2, 2], [20, 37], heads=heads, rope_dim=rope_dim)
    slots = torch.full((4, 9), -1)
    slots[0, :4] = token_slots(case.table, 0, 20, 16)[[3, 19, 0, 7]]
    slots[2, 1:] = token_slots(case.table, 1, 37, 16)[10:18]
    slots[3, ::2] = token_slots(case.table, 1, 37, 16)[[36, 1, 5, 33, 20]]
    assert_matches_reference(case, 64, slots=slots)
    assert torch.isneginf(mla_attend(*case.args, latent_dim=64, scale=0.1, slots=slots)[1][1]).all()


def test_the_first_slot_of_the_first_page_is_a_slot_like_any_other() -> None:
    pages = torch.randn(1, 4, 12)
    args = (torch.randn(1, 2, 12), pages, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]), torch.tensor([4]))
    out, _ = mla_attend(*args, latent_dim=8, scale=1.0, slots=torch.tensor([[-1, 0, -1]]))
    torch.testing.assert_close(out, pages[:, :1, :8].expand(1, 2, 8))


def test_slots_of_a_whole_range_equal_the_range() -> None:
    case = mla_case([1], [37], heads=3, dtype=torch.float32)
    by_slots = mla_attend(*case.args, latent_dim=64, scale=2.0, slots=token_slots(case.table, 0, 37, 16)[None])
    torch.testing.assert_close(by_slots, mla_attend(*case.args, latent_dim=64, scale=2.0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "latent_dim", "rope_dim"), [(3, 44, 9), (21, 64, 32)])
def test_a_sequence_does_not_change_by_a_bit_with_the_rest_of_the_batch(
    dtype: torch.dtype, heads: int, latent_dim: int, rope_dim: int
) -> None:
    q_lens, kv_lens = [3, 1, 18, 2], [2100, 7, 1030, 65]
    shape = {"heads": heads, "latent_dim": latent_dim, "rope_dim": rope_dim, "page_size": 13}
    case = mla_case(q_lens, kv_lens, dtype=dtype, **shape)
    out, lse = mla_attend(*case.args, latent_dim=latent_dim, scale=0.3)
    for b, (first, last) in enumerate(zip(case.q_start[:-1].tolist(), case.q_start[1:].tolist(), strict=True)):
        own = slice(first, last)
        alone = mla_attend(
            case.q[own],
            case.pages,
            case.table[b : b + 1],
            torch.tensor([0, last - first]),
            case.stop[own],
            latent_dim=latent_dim,
            scale=0.3,
        )
        assert torch.equal(alone[0], out[own])
        assert torch.equal(alone[1], lse[own])


def test_results_do_not_change_by_a_bit_with_where_the_pages_lie() -> None:
    case = mla_case([2], [100], heads=3, latent_dim=44, rope_dim=9, page_size=13, dtype=torch.float32)
    own = case.table[0, :8].long()
    for offset in (0, 1, 2):  # consecutive pages, read in place from different alignments
        pages = torch.full((11, 13, 53), float("nan"))
        pages[offset : offset + 8] = case.pages[own]
        table = torch.arange(offset, offset + 8)[None]
        moved = mla_attend(case.q, pages, table, case.q_start, case.stop, latent_dim=44, scale=0.3)
        for actual, expected in zip(moved, mla_attend(*case.args, latent_dim=44, scale=0.3), strict=True):
            assert torch.equal(actual, expected)


def test_both_forms_of_mla_agree_to_1e_12_and_the_fast_op_with_them() -> None:
    gen = torch.Generator().manual_seed(0)
    heads, nope, rope, rank, value, tokens = 4, 24, 8, 64, 20, 50
    c, k_rope, q_nope, q_rope, w_uk, w_uv = (
        torch.randn(*shape, generator=gen, dtype=torch.float64)
        for shape in [
            (tokens, rank),
            (tokens, rope),
            (tokens, heads, nope),
            (tokens, heads, rope),
            (heads, nope, rank),
            (heads, value, rank),
        ]
    )
    stop = torch.arange(1, tokens + 1)
    args = (q_nope, q_rope, c, k_rope, w_uk, w_uv, stop, 0.05)
    expanded = reference.mla_expanded(*args)
    torch.testing.assert_close(reference.mla_absorbed(*args), expanded, atol=1e-12, rtol=1e-12)

    q = torch.cat([torch.einsum("hdl,thd->thl", w_uk, q_nope), q_rope], dim=-1)
    pages = torch.cat([c, k_rope], dim=-1).view(5, 10, rank + rope)
    out, _ = mla_attend(q, pages, torch.arange(5)[None], torch.tensor([0, tokens]), stop, latent_dim=rank, scale=0.05)
    torch.testing.assert_close(torch.einsum("hdl,thl->thd", w_uv, out), expanded, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.one_of(st.integers(1, 7), st.integers(8, 40)),
    latent_dim=st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 160])),
    rope_dim=st.one_of(st.integers(0, 6), st.sampled_from([32, 64])),
    page_size=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kv_format=st.sampled_from([None, "int8", "fp8"]),
    data=st.data(),
)
def test_any_shape_page_size_and_ranges_match_the_reference(
    lens: list[tuple[int, int]],
    heads: int,
    latent_dim: int,
    rope_dim: int,
    page_size: int,
    dtype: torch.dtype,
    kv_format: KVFormat | None,
    data: st.DataObject,
) -> None:
    case = mla_case(
        [q for q, _ in lens],
        [n for _, n in lens],
        heads=heads,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        page_size=page_size,
        dtype=dtype,
        kv_format=kv_format,
    )
    ranges = [(data.draw(st.integers(0, n)), data.draw(st.integers(0, n))) for q, n in lens for _ in range(q)]
    start = torch.tensor([a for a, _ in ranges], dtype=torch.int32)
    stop = torch.tensor([b for _, b in ranges], dtype=torch.int32)
    args, options = (*case.args[:4], stop), {"latent_dim": latent_dim, "scale": 0.5, "kv_format": kv_format}
    expected = reference.mla_attend(*args, start=start, **options)
    # In float32: to round a result of a few numbers to bf16 may alone turn it by more than the bar allows.
    result = mla_attend(*args, start=start, out_dtype=torch.float32, **options)
    assert_meets_bar(result, expected)
    for actual, exact in zip(result, expected, strict=True) if dtype == torch.float32 else ():
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


def test_mla_decode_reads_the_new_tokens_causally() -> None:
    case = mla_case([3, 3], [17, 40], heads=5)
    kv_lens = torch.tensor([17, 40])
    out, lse = mla_decode(case.q.view(2, 3, 5, 80), case.pages, case.table, kv_lens, latent_dim=64, scale=0.1)
    expected, expected_lse = reference.mla_attend(*case.args, latent_dim=64, scale=0.1)
    assert out.shape == (2, 3, 5, 64)
    assert lse.shape == (2, 5, 3)
    assert_meets_bar((out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)), (expected, expected_lse))


def test_mla_decode_without_causality_lets_every_new_token_read_all() -> None:
    case = mla_case([3], [17], heads=2)
    out, _ = mla_decode(
        case.q[None], case.pages, case.table, torch.tensor([17]), latent_dim=64, scale=0.1, causal=False
    )
    args = (*case.args[:4], torch.tensor([17, 17, 17]))
    torch.testing.assert_close(out[0], mla_attend(*args, latent_dim=64, scale=0.1)[0], atol=0, rtol=0)


def test_the_output_can_be_given_and_its_dtype_chosen() -> None:
    case = mla_case([1], [9], heads=2)
    plain, _ = mla_attend(*case.args, latent_dim=64, scale=0.1)
    given_out = torch.full((1, 2, 64), float("nan"))
    out, _ = mla_attend(*case.args, latent_dim=64, scale=0.1, out=given_out)
    partial, _ = mla_attend(*case.args, latent_dim=64, scale=0.1, out_dtype=torch.float32)
    assert out is given_out
    assert torch.equal(out, partial)
    assert torch.equal(partial.bfloat16(), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"latent_dim": 81}, "latent_dim is 81"),
        ({"q": torch.zeros(1, 80)}, "q has shape"),
        ({"q": torch.zeros(1, 2, 80, dtype=torch.int32)}, "q must be float"),
        ({"q": torch.zeros(1, 2, 96)}, "too narrow"),
        ({"kv_pages": torch.zeros(4, 16, 80, dtype=torch.uint8)}, "need kv_format="),
        ({"kv_format": "int8"}, "int8 pages are torch.uint8"),
        ({"kv_format": "int4"}, "unknown cache format 'int4'"),
        ({"kv_pages": torch.zeros(4, 80, 16).transpose(1, 2)}, "contiguous"),
        ({"block_table": torch.zeros(2, 2)}, "q_start has shape"),
        ({"stop": torch.tensor([17, 18])}, "stop has shape"),
        ({"stop": torch.tensor([170])}, "outside the 4 pages"),
        ({"start": torch.tensor([-1])}, "outside the 4 pages"),
        ({"stop": torch.tensor([50])}, "page 2147480000 is not one of"),
        ({"q_start": torch.tensor([0, 2])}, "q_start must rise"),
        ({"slots": torch.tensor([[1000]])}, "past the last"),
        ({"out": torch.zeros(1, 2, 63)}, "out has shape"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    case = mla_case([1], [17], heads=2, dtype=torch.float32)
    args = dict(zip(("q", "kv_pages", "block_table", "q_start", "stop"), case.args, strict=True))
    with pytest.raises(OpError, match=message):
        mla_attend(**{**args, "latent_dim": 64, "scale": 0.1, **changes})
