"""Native attention gives the same bits whatever else runs: threads, callers, the batch, where pages lie."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from ops_cases import gqa_case, mla_case, tenth
from torch import Tensor

from latentkv.kernels import BF16_BACKENDS, current_backend
from latentkv.ops import KVFormat, gqa_attend, mla_attend, mla_prefill

Attend = Callable[[], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def native(backend: str) -> None:
    if backend == "torch":
        pytest.skip("only the native kernels promise this")


@pytest.fixture
def threads() -> Generator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attentions(dtype: torch.dtype) -> list[Attend]:
    """Long enough to be cut into chunks and shared out: one group, several, many; every op."""
    one = mla_case([1], [2500], heads=16, dtype=dtype)
    several = mla_case([3, 1, 9], [1500, 700, 40], heads=21, latent_dim=44, rope_dim=9, page_size=13, dtype=dtype)
    many = mla_case([1] * 9, [300 + 60 * i for i in range(9)], heads=8, dtype=dtype)
    grouped = gqa_case([1, 4], [1100, 600], heads=6, kv_heads=3, dtype=dtype)
    shape = {"heads": 21, "latent_dim": 64, "rope_dim": 32, "page_size": 13}
    formats: list[KVFormat | None] = [None, "int8", "fp8"]
    lanes = [(kv, mla_case([3, 1, 9], [1500, 700, 40], dtype=dtype, kv_format=kv, **shape)) for kv in formats]
    calls: list[Attend] = [
        partial(mla_attend, *case.args, latent_dim=64, kv_format=kv, scale=0.3) for kv, case in lanes
    ]
    if current_backend() in BF16_BACKENDS and dtype == torch.bfloat16:  # the kernels with int8 products
        short = mla_case([3, 1, 9], [1500, 700, 40], heads=21, latent_dim=44, rope_dim=9, dtype=dtype, kv_format="int8")
        long = mla_case([1], [2500], heads=16, dtype=dtype, kv_format="int8")
        options: dict[str, Any] = {"kv_format": "int8", "int8_products": True, "scale": 0.3}
        calls += [
            lambda: mla_attend(*short.args, latent_dim=44, **options),
            lambda: mla_attend(*long.args, latent_dim=64, **options),
        ]
    window = mla_case([40, 9], [300, 45], heads=4, latent_dim=44, rope_dim=9, page_size=13, dtype=dtype)
    window_start = (window.stop - 10).clamp(min=0)
    q, k, v = (tenth((n, 3, d), dtype, n) for n, d in ((240, 24), (310, 24), (310, 16)))
    bounds = torch.tensor([0, 200, 240]), torch.tensor([0, 260, 310])
    return [
        *calls,
        lambda: mla_attend(*one.args, latent_dim=64, scale=0.3),
        lambda: mla_attend(*several.args, latent_dim=44, scale=0.3),
        lambda: mla_attend(*many.args, latent_dim=64, scale=0.3),
        lambda: gqa_attend(*grouped.args, scale=0.3),
        lambda: mla_attend(*window.args, latent_dim=44, scale=0.3, start=window_start),
        lambda: mla_prefill(q, k, v, *bounds, scale=0.3),
    ]


def assert_same_bits(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    calls = attentions(dtype)
    threads(1)
    expected = [call() for call in calls]
    for count in (2, 3):
        threads(count)
        for call, alone in zip(calls, expected, strict=True):
            assert_same_bits(call(), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_callers_at_once_change_nothing(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(2)
    calls = attentions(dtype)
    expected = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        futures = [
            (pool.submit(contextvars.copy_context().run, call), alone)
            for _ in range(8)
            for call, alone in zip(calls, expected, strict=True)
        ]
        for future, alone in futures:
            assert_same_bits(future.result(), alone)


@pytest.mark.parametrize("heads", [1, 5, 9, 16, 130])
@pytest.mark.parametrize(("rope_dim", "kv_format"), [(16, None), (32, None), (64, "int8"), (64, "fp8")])
def test_a_row_does_not_change_with_the_rows_of_its_sequence_beside_it(
    heads: int, rope_dim: int, kv_format: KVFormat | None
) -> None:
    case = mla_case([7], [90], heads=heads, rope_dim=rope_dim, kv_format=kv_format)
    options: dict[str, Any] = {"latent_dim": 64, "scale": 0.3, "kv_format": kv_format}
    out, lse = mla_attend(*case.args, **options)
    for t in range(7):
        own, bounds = slice(t, t + 1), torch.tensor([0, 1])
        alone = mla_attend(case.q[own], case.pages, case.table, bounds, case.stop[own], **options)
        assert_same_bits(alone, (out[own], lse[own]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [5, 10, 150])
@pytest.mark.parametrize("rope_dim", [16, 32])
def test_a_row_with_a_window_does_not_change_with_the_rows_beside_it(
    dtype: torch.dtype, window: int, rope_dim: int
) -> None:
    case = mla_case([40], [300], heads=8, rope_dim=rope_dim, dtype=dtype)
    start = (case.stop - window).clamp(min=0)
    options: dict[str, Any] = {"latent_dim": 64, "scale": 10.0, "out_dtype": torch.float32}  # so that every bit shows
    out, lse = mla_attend(*case.args, start=start, **options)
    for t in range(40):
        own, bounds = slice(t, t + 1), torch.tensor([0, 1])
        alone = mla_attend(case.q[own], case.pages, case.table, bounds, case.stop[own], start=start[own], **options)
        assert_same_bits(alone, (out[own], lse[own]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "latent_dim", "rope_dim"), [(3, 44, 9), (24, 64, 32)])
def test_where_pages_lie_and_how_large_they_are_changes_nothing(
    dtype: torch.dtype, heads: int, latent_dim: int, rope_dim: int
) -> None:
    expected = None
    for page_size, seed in ((64, 0), (64, 1), (13, 0), (1, 0)):
        shape = {"heads": heads, "latent_dim": latent_dim, "rope_dim": rope_dim, "page_size": page_size}
        case = mla_case([2], [700], dtype=dtype, **shape)
        order = torch.randperm(len(case.pages), generator=torch.Generator().manual_seed(seed))
        pages = torch.full_like(case.pages, float("nan"))
        pages[order] = case.pages
        table = case.table.clone()
        used = -(-700 // page_size)
        table[0, :used] = order.int()[case.table[0, :used].long()]
        result = mla_attend(case.q, pages, table, case.q_start, case.stop, latent_dim=latent_dim, scale=0.3)
        expected = expected or result
        assert_same_bits(result, expected)


@pytest.mark.parametrize(("key", "value"), [(48, 32), (64, 64), (192, 128)])
def test_prefill_in_pieces_gives_the_same_bits_as_prefill_in_one(key: int, value: int) -> None:
    q, k, v = (tenth((300, 2, d), torch.bfloat16, d) for d in (key, key, value))
    whole = mla_prefill(q, k, v, torch.tensor([0, 300]), torch.tensor([0, 300]), scale=0.3)
    pieces = [
        mla_prefill(q[a:b], k[:b], v[:b], torch.tensor([0, b - a]), torch.tensor([0, b]), scale=0.3)
        for a, b in ((0, 100), (100, 101), (101, 300))
    ]
    assert_same_bits((torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces])), whole)
