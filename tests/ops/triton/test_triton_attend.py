"""`mla_attend`, `mla_decode` and `gqa_attend` on Triton's kernels against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_cases import Paged, assert_meets_bar, gqa_case, mla_case, token_slots

from latentkv.errors import OpError
from latentkv.ops import KVFormat, gqa_attend, mla_attend, mla_decode, reference

Run = Callable[..., Any]

HEADS = [1, 3, 9, 16, 20, 40, 63, 64, 126, 128]
STEPS = [1, 2, 3, 4, 17]
RANKS = [64, 256, 512]
FORMATS: list[KVFormat | None] = [None, "int8", "fp8"]


def assert_matches_reference(run: Run, case: Paged, latent_dim: int, scale: float = 0.1, **rows: Any) -> None:
    options = {"latent_dim": latent_dim, "scale": scale, "kv_format": case.kv_format, **rows}
    assert_meets_bar(run(mla_attend, *case.args, **options), reference.mla_attend(*case.args, **options))


def assert_shape_meets_the_bar(run: Run, heads: int, steps: int, rank: int) -> None:
    case = mla_case([steps] * 3, [steps, 33, 70], heads=heads, latent_dim=rank, rope_dim=64, page_size=32, seed=heads)
    assert_matches_reference(run, case, rank, (rank + 64) ** -0.5)


@pytest.mark.parametrize(
    ("heads", "steps", "rank"),
    [
        *[(1, 17, 64), (3, 3, 256), (9, 4, 64), (16, 1, 512), (63, 2, 64)],
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(20, 2, 64), (40, 1, 256), (126, 1, 64)]),
    ],
)
def test_shapes_meet_the_bar(run: Run, heads: int, steps: int, rank: int) -> None:
    assert_shape_meets_the_bar(run, heads, steps, rank)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rank", RANKS)
def test_every_shape_meets_the_bar(run: Run, heads: int, steps: int, rank: int) -> None:
    assert_shape_meets_the_bar(run, heads, steps, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_and_a_peaked_softmax_meet_the_bar(run: Run, dtype: torch.dtype) -> None:
    case = mla_case([2, 5], [40, 61], heads=5, dtype=dtype)
    assert_matches_reference(run, case, 64, scale=30.0)
    assert run(mla_attend, *case.args, latent_dim=64, scale=1.0)[0].dtype == dtype


def test_pages_of_another_dtype_than_the_queries_are_multiplied_in_float32(run: Run) -> None:
    case = mla_case([2], [30], heads=3, dtype=torch.float16)
    args = (case.q.float(), *case.args[1:])
    options = {"latent_dim": 64, "scale": 3.0}
    for actual, exact in zip(run(mla_attend, *args, **options), reference.mla_attend(*args, **options), strict=True):
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


def test_float32_is_accurate_to_float32_over_several_chunks(run: Run) -> None:
    case = mla_case([3, 1], [2300, 1025], heads=4, latent_dim=16, rope_dim=8, page_size=48, dtype=torch.float32)
    options = {"latent_dim": 16, "scale": 3.0}
    for actual, exact in zip(
        run(mla_attend, *case.args, **options), reference.mla_attend(*case.args, **options), strict=True
    ):
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.thin(meet=1)
@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("latent_dim", "rope_dim", "dtype"),
    [
        (512, 64, torch.bfloat16),
        (160, 20, torch.float16),
        (44, 9, torch.float32),
        (129, 7, torch.bfloat16),
        (128, 0, torch.bfloat16),
    ],
)
def test_quantised_pages_are_read_as_the_numbers_that_they_stand_for(
    run: Run, kv_format: KVFormat, latent_dim: int, rope_dim: int, dtype: torch.dtype
) -> None:
    shape = {"latent_dim": latent_dim, "rope_dim": rope_dim, "page_size": 24}
    case = mla_case([3, 1], [50, 130], heads=4, dtype=dtype, kv_format=kv_format, **shape)
    scale = 2.0 if dtype == torch.float32 else (latent_dim + rope_dim) ** -0.5
    assert_matches_reference(run, case, latent_dim, scale)


@pytest.mark.parametrize("page_size", [1, 7])
def test_every_length_from_one_token_to_a_page_and_one_is_read(run: Run, page_size: int) -> None:
    lens = list(range(1, page_size + 2))
    assert_matches_reference(run, mla_case([1] * len(lens), lens, heads=3, page_size=page_size), 64)


def test_a_sequence_without_tokens_or_rows_gives_zero_and_minus_infinity(run: Run) -> None:
    case = mla_case([1, 3, 0, 2], [0, 2, 9, 5], heads=2)
    out, lse = run(mla_attend, *case.args, latent_dim=64, scale=0.1)
    assert out[:2].abs().sum() == 0
    assert torch.isneginf(lse[:2]).all()
    assert_matches_reference(run, case, 64)


def test_no_rows_at_all_give_an_empty_result(run: Run) -> None:
    case = mla_case([], [], heads=2)
    out, lse = run(mla_attend, *case.args, latent_dim=64, scale=0.1, launches=False)
    assert (out.shape, lse.shape) == ((0, 2, 64), (0, 2))


@pytest.mark.parametrize("window", [1, 24])
def test_sliding_windows_read_only_their_tokens(run: Run, window: int) -> None:
    case = mla_case([4, 1, 20], [30, 3, 45], heads=3)
    start = (case.stop - window).clamp(min=0)
    for t, b in enumerate(torch.repeat_interleave(torch.arange(3), torch.tensor([4, 1, 20])).tolist()):
        if t == int(case.q_start[b]):  # the first row's window starts first: all before it is poisoned
            case.pages.view(-1, 80)[token_slots(case.table, b, int(start[t]), 16)] = float("nan")
    assert_matches_reference(run, case, 64, start=start)


def test_tokens_that_no_row_reads_may_be_nan_even_between_rows(run: Run) -> None:
    case = mla_case([3], [30], heads=3)
    start, stop = torch.tensor([0, 20, 25]), torch.tensor([5, 30, 25])
    case.pages.view(-1, 80)[token_slots(case.table, 0, 30, 16)[5:20]] = float("nan")
    assert_matches_reference(run, replace(case, stop=stop), 64, start=start)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_slots_name_the_tokens_to_read(run: Run, kv_format: KVFormat | None) -> None:
    case = mla_case([2, 2], [20, 37], heads=3, kv_format=kv_format)
    slots = torch.full((4, 9), -1)
    slots[0, :4] = token_slots(case.table, 0, 20, 16)[[3, 19, 0, 7]]
    slots[2, 1:] = token_slots(case.table, 1, 37, 16)[10:18]
    slots[3, ::2] = token_slots(case.table, 1, 37, 16)[[36, 1, 5, 33, 20]]
    assert_matches_reference(run, case, 64, slots=slots)
    assert torch.isneginf(
        run(mla_attend, *case.args, latent_dim=64, scale=0.1, slots=slots, kv_format=kv_format)[1][1]
    ).all()


def test_the_first_slot_of_the_first_page_is_a_slot_like_any_other(run: Run) -> None:
    pages = torch.randn(1, 4, 12)
    args = (torch.randn(1, 2, 12), pages, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]), torch.tensor([4]))
    out, _ = run(mla_attend, *args, latent_dim=8, scale=1.0, slots=torch.tensor([[-1, 0, -1]]))
    torch.testing.assert_close(out, pages[:, :1, :8].expand(1, 2, 8))


def test_int64_numbers_beyond_int32_are_left_to_torch_which_refuses_them(run: Run) -> None:
    q, pages, bounds = torch.randn(1, 2, 12), torch.randn(3, 4, 12), torch.tensor([0, 1])
    options = {"latent_dim": 8, "scale": 1.0}
    table, stop = torch.tensor([[1]]), torch.tensor([4])
    expected, _ = run(mla_attend, q, pages, table, bounds, stop, **options)
    unused = torch.tensor([[1, 2**32 + 2]])  # what is not read may be anything
    got, _ = run(mla_attend, q, pages, unused, bounds, stop, **options, launches=False)
    torch.testing.assert_close(got, expected)
    with pytest.raises(OpError, match="lie outside the 1 pages"):
        run(mla_attend, q, pages, table, bounds, torch.tensor([2**32 + 2]), **options, launches=False)
    options["slots"] = torch.tensor([[-(2**63)]])
    out, lse = run(mla_attend, q, pages, table, bounds, stop, **options, launches=False)
    assert not out.any()
    assert lse.isneginf().all()


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 30])
def test_a_query_that_is_not_finite_shows(run: Run, kv_format: KVFormat | None, value: float, tokens: int) -> None:
    case = mla_case([1], [tokens], heads=4, rope_dim=32, kv_format=kv_format)
    for number in range(3):  # of both signs in the key: scores of +inf and of -inf
        q = case.q.clone()
        q[0, 1, number] = value
        out, lse = run(mla_attend, q, *case.args[1:], latent_dim=64, scale=0.1, kv_format=kv_format)
        assert out[0, 1].isnan().all()
        assert not lse[0, 1].isfinite()
        assert out[0, 0].isfinite().all()


@pytest.mark.parametrize(("dtype", "kv_format"), [(torch.float32, None), (torch.bfloat16, "fp8")])
def test_a_sequence_does_not_change_by_a_bit_with_the_rest_of_the_batch(
    run: Run, dtype: torch.dtype, kv_format: KVFormat | None
) -> None:
    shape: dict[str, Any] = {"heads": 5, "latent_dim": 44, "rope_dim": 9, "page_size": 13, "kv_format": kv_format}
    case = mla_case([3, 1, 8], [1100, 7, 65], dtype=dtype, **shape)
    options = {"latent_dim": 44, "scale": 0.3, "out_dtype": torch.float32, "kv_format": kv_format}
    out, lse = run(mla_attend, *case.args, **options)
    for b, (first, last) in enumerate(zip(case.q_start[:-1].tolist(), case.q_start[1:].tolist(), strict=True)):
        own, bounds = slice(first, last), torch.tensor([0, last - first])
        alone = run(mla_attend, case.q[own], case.pages, case.table[b : b + 1], bounds, case.stop[own], **options)
        assert torch.equal(alone[0], out[own])
        assert torch.equal(alone[1], lse[own])


@pytest.mark.parametrize(
    "tokens", [67, pytest.param(90, marks=pytest.mark.slow), 131]
)  # the rows' ends lie on both sides of a block's, or on one
def test_a_row_does_not_change_by_a_bit_with_the_rows_of_its_sequence_beside_it(run: Run, tokens: int) -> None:
    case = mla_case([7], [tokens], heads=5)
    options = {"latent_dim": 64, "scale": 0.3, "out_dtype": torch.float32}
    out, lse = run(mla_attend, *case.args, **options)
    for t in range(7):
        own = slice(t, t + 1)
        alone = run(mla_attend, case.q[own], case.pages, case.table, torch.tensor([0, 1]), case.stop[own], **options)
        assert torch.equal(alone[0], out[own])
        assert torch.equal(alone[1], lse[own])


def test_a_window_longer_than_the_sequence_is_the_whole_sequence(run: Run) -> None:
    case = mla_case([2], [100], heads=4)
    whole = run(mla_attend, *case.args, latent_dim=64, scale=0.3)
    window = run(mla_attend, *case.args, latent_dim=64, scale=0.3, start=case.stop - 4096)
    for actual, expected in zip(window, whole, strict=True):
        assert torch.equal(actual, expected)


def test_as_many_passes_as_the_workspace_needs_change_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentkv.ops.triton import attention

    case = mla_case([3, 0, 5], [66, 9, 130], heads=5)
    whole = run(mla_attend, *case.args, latent_dim=64, scale=0.3)
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", 1)
    for actual, expected in zip(run(mla_attend, *case.args, latent_dim=64, scale=0.3), whole, strict=True):
        assert torch.equal(actual, expected)


def test_a_row_never_reads_past_its_block_table(run: Run) -> None:
    case = mla_case([1], [16], heads=2)
    table = case.table[:, :1]
    whole = run(mla_attend, case.q, case.pages, table, case.q_start, torch.tensor([16]), latent_dim=64, scale=0.1)
    beyond = run(mla_attend, case.q, case.pages, table, case.q_start, torch.tensor([5000]), latent_dim=64, scale=0.1)
    for actual, expected in zip(beyond, whole, strict=True):
        assert torch.equal(actual, expected)


def test_queries_and_outputs_may_be_slices_of_wider_tensors(run: Run) -> None:
    case = mla_case([2, 1], [20, 9], heads=3)
    wide = torch.cat([case.q, case.q], dim=1)[:, 3:]
    out = torch.full((3, 5, 64), float("nan"))
    expected, lse = run(mla_attend, *case.args, latent_dim=64, scale=0.1, out_dtype=torch.float32)
    result = run(mla_attend, wide, *case.args[1:], latent_dim=64, scale=0.1, out=out[:, 1:4])
    assert torch.equal(result[0], expected)
    assert torch.equal(result[1], lse)


def test_mla_decode_reads_the_new_tokens_causally(run: Run) -> None:
    case = mla_case([3, 3], [17, 40], heads=5)
    args = case.q.view(2, 3, 5, 80), case.pages, case.table, torch.tensor([17, 40])
    out, lse = run(mla_decode, *args, latent_dim=64, scale=0.1)
    expected = reference.mla_attend(*case.args, latent_dim=64, scale=0.1)
    assert_meets_bar((out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)), expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [
        *[(1, 1, torch.float32), (4, 4, torch.bfloat16), (9, 3, torch.bfloat16), (40, 2, torch.float32)],
        pytest.param(1, 1, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, 4, torch.float32, marks=pytest.mark.slow),
        pytest.param(9, 3, torch.float32, marks=pytest.mark.slow),
        pytest.param(40, 2, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_mha_gqa_and_mqa_meet_the_bar(run: Run, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = gqa_case([1, 5, 2, 1], [17, 5, 50, 0], heads=heads, kv_heads=kv_heads, dtype=dtype)
    assert_meets_bar(run(gqa_attend, *case.args, scale=2.0), reference.gqa_attend(*case.args, scale=2.0))


def test_windows_over_keys_and_values_never_read_what_lies_before_them(run: Run) -> None:
    case = gqa_case([20], [90], heads=4, kv_heads=2, page_size=7)
    start = case.stop - 24
    case.pages.view(-1, 2, 2, 32)[token_slots(case.table, 0, int(start[0]), 7)] = float("nan")
    expected = reference.gqa_attend(*case.args, scale=1.0, start=start)
    assert_meets_bar(run(gqa_attend, *case.args, scale=1.0, start=start), expected)
