"""Attention over int8 pages in int8 products: close to float64 over the same pages, and never without being asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import Paged, mla_case, token_slots

from latentkv.errors import OpError
from latentkv.kernels import BF16_BACKENDS, available_backends, use_backend
from latentkv.ops import mla_attend, mla_decode, reference

needs_vnni = pytest.mark.skipif(
    not set(BF16_BACKENDS) & set(available_backends()), reason="this CPU has no AVX-512 VNNI kernels"
)
OPTIONS: dict[str, Any] = {"kv_format": "int8", "int8_products": True}


def assert_close(case: Paged, latent_dim: int, scale: float, *, cosine: float = 1e-4, **rows: Any) -> None:
    out, lse = mla_attend(*case.args, latent_dim=latent_dim, scale=scale, **OPTIONS, **rows)
    expected, expected_lse = reference.mla_attend(
        *case.args, latent_dim=latent_dim, scale=scale, kv_format="int8", **rows
    )
    x, y = out.double().flatten(), expected.flatten()
    assert 1 - 2 * (x @ y).item() / (x.square().sum() + y.square().sum()).item() < cosine
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse[~finite].double(), expected_lse[~finite])
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], atol=1e-2 * scale, rtol=1e-4)


@needs_vnni
@pytest.mark.parametrize("heads", [1, 3, 9, 16, 20, 40, 63, 64, 126, 128])
@pytest.mark.parametrize("steps", [1, 3, 17])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (256, 32), (160, 20), (44, 9), (128, 0)])
def test_every_shape_stays_within_the_bar_for_int8_products(
    heads: int, steps: int, latent_dim: int, rope_dim: int
) -> None:
    case = mla_case(
        [steps] * 3,
        [steps, 33, 300],
        heads=heads,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        page_size=32,
        kv_format="int8",
        seed=heads,
    )
    assert_close(case, latent_dim, (latent_dim + rope_dim) ** -0.5)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.04, 1.0, 5.0])
def test_long_contexts_and_sharper_softmaxes_stay_within_it_too(dtype: torch.dtype, scale: float) -> None:
    case = mla_case([2, 1], [2700, 700], heads=16, latent_dim=512, rope_dim=64, dtype=dtype, kv_format="int8")
    assert_close(case, 512, scale)


@needs_vnni
def test_windows_slots_and_gaps_read_their_tokens_only() -> None:
    case = mla_case([4, 1, 40], [330, 3, 445], heads=5, latent_dim=64, rope_dim=16, kv_format="int8")
    for window in (1, 24, 300):
        assert_close(case, 64, 0.3, start=(case.stop - window).clamp(min=0))
    slots = torch.full((45, 300), -1)
    slots[2, ::2] = token_slots(case.table, 0, 330, 16)[100:250]
    slots[30] = token_slots(case.table, 2, 445, 16)[130:430]
    assert_close(case, 64, 0.3, slots=slots)


@needs_vnni
@pytest.mark.parametrize("heads", [1, 5, 16])
def test_a_row_does_not_change_by_a_bit_with_the_rows_beside_it(heads: int) -> None:
    case = mla_case([9], [300], heads=heads, latent_dim=128, rope_dim=64, kv_format="int8")
    out, lse = mla_attend(*case.args, latent_dim=128, scale=1.0, **OPTIONS)
    for t in range(9):
        own, bounds = slice(t, t + 1), torch.tensor([0, 1])
        alone = mla_attend(
            case.q[own], case.pages, case.table, bounds, case.stop[own], latent_dim=128, scale=1.0, **OPTIONS
        )
        assert torch.equal(alone[0], out[own])
        assert torch.equal(alone[1], lse[own])


@needs_vnni
def test_rows_without_tokens_give_zero_and_minus_infinity() -> None:
    case = mla_case([1, 3, 2], [0, 2, 5], heads=2, kv_format="int8")
    out, lse = mla_attend(*case.args, latent_dim=64, scale=0.1, **OPTIONS)
    assert out[:2].abs().sum() == 0
    assert torch.isneginf(lse[:2]).all()


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_not_hidden(value: float) -> None:
    case = mla_case([1], [40], heads=3, latent_dim=128, rope_dim=64, kv_format="int8")
    case.q[0, 1, 7] = value
    out, lse = mla_attend(*case.args, latent_dim=128, scale=0.1, **OPTIONS)
    assert out[0, 1].isnan().all() and not lse[0, 1].isfinite()
    assert out[0, [0, 2]].isfinite().all() and lse[0, [0, 2]].isfinite().all()


@needs_vnni
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37, 1e-20])
def test_tiny_queries_give_the_plain_mean(size: float) -> None:
    case = mla_case([1], [40], heads=3, latent_dim=128, rope_dim=64, dtype=torch.float32, kv_format="int8")
    case.q.fill_(size)
    assert_close(case, 128, 0.1)


@needs_vnni
def test_tiles_far_below_the_peak_stay_finite() -> None:
    case = mla_case([1], [600], heads=2, latent_dim=128, rope_dim=64, dtype=torch.float32, kv_format="int8")
    case.q.mul_(4000)
    out, lse = mla_attend(*case.args, latent_dim=128, scale=1.0, **OPTIONS)
    assert out.isfinite().all() and lse.isfinite().all()


@needs_vnni
def test_mla_decode_passes_the_choice_on() -> None:
    case = mla_case([1], [700], heads=16, latent_dim=128, kv_format="int8")
    q, lens = case.q[None], torch.tensor([700])
    bytes_, exact = (
        mla_decode(q, case.pages, case.table, lens, latent_dim=128, scale=1.0, kv_format="int8", int8_products=chosen)
        for chosen in (True, False)
    )
    assert not torch.equal(bytes_[0], exact[0])
    torch.testing.assert_close(bytes_[0], exact[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_other_pages_are_refused(kv_format: Any) -> None:
    case = mla_case([1], [9], heads=2, kv_format=kv_format)
    with pytest.raises(OpError, match="int8_products multiplies int8 pages"):
        mla_attend(*case.args, latent_dim=64, scale=0.1, kv_format=kv_format, int8_products=True)


@needs_vnni
def test_what_the_kernels_cannot_take_is_named() -> None:
    case = mla_case([1], [9], heads=2, dtype=torch.float32, kv_format="int8")
    args = (case.q.double(), *case.args[1:])
    with pytest.raises(OpError, match="q and out must be bf16, fp16 or fp32"):
        mla_attend(*args, latent_dim=64, scale=0.1, **OPTIONS)


@pytest.mark.parametrize("backend", [name for name in available_backends() if name not in BF16_BACKENDS])
def test_kernels_without_int8_products_refuse_instead_of_falling_back(backend: Any) -> None:
    case = mla_case([1], [9], heads=2, kv_format="int8")
    with use_backend(backend), pytest.raises(OpError, match="int8_products cannot be had here"):
        mla_attend(*case.args, latent_dim=64, scale=0.1, **OPTIONS)


@needs_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_shows_in_every_head(value: float) -> None:
    case = mla_case([1], [2], heads=8, latent_dim=64, rope_dim=64, kv_format="int8")
    row = case.pages.view(-1, case.pages.shape[2])[token_slots(case.table, 0, 2, 16)[1]]
    row[128:130] = torch.tensor([value], dtype=torch.float16).view(torch.int8)
    out, _ = mla_attend(*case.args, latent_dim=64, scale=0.1, **OPTIONS)
    assert not out.isfinite().all(-1).any()
