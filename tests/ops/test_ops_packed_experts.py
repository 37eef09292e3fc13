"""`moe_experts`, `gated_mlp` and `headwise_linear` on packed weights against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops import SwigluLimit, gated_mlp, headwise_linear, moe_experts, reference
from latentkv.weights.layout import PackedWeight, pack_weight
from quantised_weights import quantised

FORMATS = [
    *[("bf16", None), ("compact", None), ("int8", None), ("int8", 32), ("int4", 32)],
    *[("int8 f16", 32), ("uint4 f16", 32), ("uint5 f32", 32), ("int6 f16", 16), ("fp4", 16), ("fp8 f32", 128)],
]
every_format = pytest.mark.parametrize(("fmt", "group"), FORMATS)


@pytest.fixture(params=kernels.available_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def weights(*shape: int, fmt: str = "bf16", group: int | None = None, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed weight and what it stands for, float64; products with it keep the size of what they multiply.

    Packed alike for every instruction set.
    """
    weight = (numbers(*shape, seed=seed, dtype=torch.float32) / shape[-1] ** 0.5).bfloat16()
    if fmt == "compact":
        weight.view(-1)[3::997] = 0  # an exception
    if fmt in ("bf16", "compact"):
        packed = pack_weight(weight, compact=fmt == "compact")
        assert weight[0].numel() < 4096 or kernels.extension is None or packed.format == fmt
        return packed, weight.double()
    integers = quantised(weight, fmt, group)
    return pack_weight(integers), integers.dequantize().double()


def choices(tokens: int, chosen: int, count: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(count, generator=gen)[:chosen] for _ in range(tokens)])
    return ids, torch.rand(tokens, chosen, generator=gen)


ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-22}
"""Of one number; the native kernels take float32 activations as three bfloat16 numbers, whose sum they are."""


def intermediate(x: Tensor, gate_up: Tensor) -> Tensor:
    return reference.silu_mul(reference.linear(x, gate_up))


def assert_close(out: Tensor, expected: Tensor, size: Tensor) -> None:
    """Where the intermediate was rounded, of which the sums' terms add up to `size`, and the result."""
    exactness = 1e-5  # of the products before the intermediate
    allowed = ROUNDING[out.dtype] * (size + expected.abs()) + exactness * (1 + size)
    assert ((out.double() - expected).abs() <= allowed).all()


def experts_size(x: Tensor, ids: Tensor, scales: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum of the magnitudes of the terms of each result."""
    of_all = torch.stack([intermediate(x, rows).abs() @ down[e].abs().T for e, rows in enumerate(gate_up)])
    terms = of_all[ids, torch.arange(len(x)).unsqueeze(1)]
    return (terms * scales.double().unsqueeze(-1)).sum(dim=1)


def on_threads(count: int, call: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return call()
    finally:
        torch.set_num_threads(threads)


@cache
def expected_of_experts(
    fmt: str, group: int | None, dtype: torch.dtype, dim: int, inner: int, tokens: int, chosen: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, ids, scales, results, size), the same for every instruction set."""
    _, gate_up = weights(6, 2 * inner, dim, fmt=fmt, group=group, seed=1)
    _, down = weights(6, dim, inner, fmt=fmt, group=group, seed=2)
    x, (ids, scales) = numbers(tokens, dim + 5, seed=tokens, dtype=dtype)[:, 5:], choices(tokens, chosen, 6)
    case = x, ids, scales, gate_up, down
    return x, ids, scales, reference.moe_experts(*case), experts_size(*case)


@pytest.mark.thin(meet=2)
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "inner"), [(96, 64), (50, 7), (33, 72)])
def test_experts_match_the_reference(fmt: str, group: int | None, dtype: torch.dtype, dim: int, inner: int) -> None:
    gate_up, _ = weights(6, 2 * inner, dim, fmt=fmt, group=group, seed=1)
    down, _ = weights(6, dim, inner, fmt=fmt, group=group, seed=2)
    for tokens, chosen in [(1, 1), (1, 6), (2, 3), (70, 2)]:
        x, ids, scales, expected, size = expected_of_experts(fmt, group, dtype, dim, inner, tokens, chosen)
        residual = numbers(tokens, dim, seed=9, dtype=dtype)
        out = moe_experts(x, ids, scales, gate_up, down)
        assert out.dtype == dtype
        assert_close(out, expected, size)
        added = moe_experts(x, ids, scales, gate_up, down, residual=residual)
        assert_close(added, expected + residual.double(), size)


@pytest.mark.parametrize("limit", [SwigluLimit(0.05), SwigluLimit(0.05, bounds_gate=True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_limits_bound_what_is_multiplied(dtype: torch.dtype, limit: SwigluLimit) -> None:
    gate_up, exact_gate_up = weights(6, 2 * 72, 96, seed=1)
    down, exact_down = weights(6, 96, 72, seed=2)
    x, (ids, scales) = numbers(70, 96, seed=3, dtype=dtype), choices(70, 2, 6)
    case = x, ids, scales, exact_gate_up, exact_down
    expected = reference.moe_experts(*case, limit=limit)
    assert_close(moe_experts(x, ids, scales, gate_up, down, limit=limit), expected, experts_size(*case))
    assert (reference.moe_experts(*case) - expected).abs().max() > 0.05
    unpacked = moe_experts(x, ids, scales, exact_gate_up.to(dtype), exact_down.to(dtype), limit=limit)
    assert_close(unpacked, expected, 4 * experts_size(*case))
    one, alone = weights(1, 2 * 72, 96, seed=4), weights(1, 96, 72, seed=5)
    inner = reference.silu_mul(reference.linear(x, one[1][0]), limit)
    out = gated_mlp(x, one[0], alone[0], limit=limit)
    assert_close(out, reference.linear(inner, alone[1][0]), inner.abs() @ alone[1][0].abs().T)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_experts_give_tokens_back(fmt: str, group: int | None, dtype: torch.dtype) -> None:
    dim, inner = 50, 32
    gate_up, exact_gate_up = weights(3, 2 * inner, dim, fmt=fmt, group=group, seed=1)
    down, exact_down = weights(3, dim, inner, fmt=fmt, group=group, seed=2)
    x, (ids, scales) = numbers(40, dim + 5, seed=3, dtype=dtype)[:, 5:], choices(40, 4, 9)
    residual = numbers(40, dim, seed=4, dtype=dtype)
    # Some choose experts, some zero experts, and some both; then all choose zero experts.
    assert {int(n) for n in (ids < 3).sum(1)} == {0, 1, 2, 3}
    for chosen in (ids, ids % 6 + 3):
        out = moe_experts(x, chosen, scales, gate_up, down, residual=residual, num_zero_experts=6)
        expected = reference.moe_experts(x, chosen, scales, exact_gate_up, exact_down)
        own = experts_size(x, chosen.clamp(max=2), scales * (chosen < 3), exact_gate_up, exact_down)
        given = x.double().abs() * (scales * (chosen >= 3)).double().sum(1, keepdim=True)
        assert_close(out, expected + residual.double(), own + 2**-9 * given)
    alone = moe_experts(x[7:8], ids[7:8], scales[7:8], gate_up, down, num_zero_experts=6)
    together = moe_experts(x, ids, scales, gate_up, down, num_zero_experts=6)
    assert kernels.native_isa() is None or torch.equal(alone, together[7:8])


def test_a_token_of_zero_experts_alone_is_multiplied_by_their_weights_whatever_the_experts_hold() -> None:
    gate_up, down = weights(3, 64, 40)[0], weights(3, 40, 32)[0]
    x = numbers(2, 40, seed=1)
    x[1, 7] = float("nan")  # and nothing of it reaches the other
    ids, scales = torch.tensor([[3, 4], [0, 3]]), torch.tensor([[0.25, 0.5], [1.0, 1.0]])
    out = moe_experts(x, ids, scales, gate_up, down, num_zero_experts=2)
    assert torch.equal(out[0], (0.75 * x[0].float()).bfloat16())
    assert out[1].isnan().all()


def test_all_tokens_may_choose_one_expert_and_others_none() -> None:
    gate_up, exact_gate_up = weights(5, 64, 40, seed=1)
    down, exact_down = weights(5, 40, 32, seed=2)
    x, ids, scales = numbers(1100, 40, seed=3), torch.full((1100, 2), 3), torch.rand(1100, 2)
    case = x, ids, scales, exact_gate_up, exact_down
    out = moe_experts(x, ids, scales, gate_up, down)
    assert_close(out, reference.moe_experts(*case), experts_size(*case))


def test_each_of_several_compact_matrices_is_read_with_its_own_window() -> None:
    def stacked(*shape: int, seed: int) -> tuple[PackedWeight, PackedWeight]:
        # Nothing is listed, so the compact matrices' sums are the plain ones' bit for bit.
        weight = numbers(*shape, seed=seed, dtype=torch.float32).clamp(-0.9, 0.9)
        weight = torch.where(weight.abs() < 2**-12, 2**-12, weight)
        weight = (weight * torch.tensor([1, 2**-4, 2**-8, 2**4])[:, None, None]).bfloat16()
        packed = pack_weight(weight, compact=True)
        assert kernels.extension is None or (packed.format, packed.group) == ("compact", 0)
        return packed, pack_weight(weight)

    gate_up, down, heads = stacked(4, 128, 96, seed=1), stacked(4, 96, 64, seed=2), stacked(4, 70, 96, seed=3)
    for tokens in (1, 2, 50):
        x, (ids, scales) = numbers(tokens, 96, seed=tokens), choices(tokens, 3, 4)
        compact, plain = (moe_experts(x, ids, scales, *pair) for pair in zip(gate_up, down, strict=True))
        assert torch.equal(compact, plain)
        by_head = numbers(tokens, 4, 96, seed=tokens)
        compact, plain = (headwise_linear(by_head, weight) for weight in heads)
        assert torch.equal(compact, plain)


@every_format
def test_a_token_does_not_depend_on_the_others_or_on_the_threads(backend: str, fmt: str, group: int | None) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    gate_up, down = (weights(*s, fmt=fmt, group=group, seed=1)[0] for s in [(8, 192, 128), (8, 128, 96)])
    x, (ids, scales) = numbers(60, 128, seed=2), choices(60, 3, 8)
    whole = on_threads(1, lambda: moe_experts(x, ids, scales, gate_up, down))
    for threads in (2, 3):
        assert torch.equal(on_threads(threads, lambda: moe_experts(x, ids, scales, gate_up, down)), whole)
    for part in (slice(7, 8), slice(0, 17), slice(20, 60)):
        assert torch.equal(moe_experts(x[part], ids[part], scales[part], gate_up, down), whole[part])


def test_many_tokens_are_the_same_tokens_in_several_passes(backend: str) -> None:
    if backend in ("torch", "portable"):
        pytest.skip("slow for so many tokens")
    gate_up, down = (weights(*s, seed=1)[0] for s in [(2, 64, 4096), (2, 4096, 32)])
    x, (ids, scales) = numbers(3000, 4096, seed=2), choices(3000, 2, 2)
    out = moe_experts(x, ids, scales, gate_up, down)
    assert torch.equal(moe_experts(x[2900:], ids[2900:], scales[2900:], gate_up, down), out[2900:])


def test_not_a_number_stays_with_its_token() -> None:
    gate_up, down = weights(3, 64, 40)[0], weights(3, 40, 32)[0]
    x, (ids, scales) = numbers(9, 40, seed=1), choices(9, 2, 3)
    x[4, 7] = float("nan")
    rows = moe_experts(x, ids, scales, gate_up, down).isnan().sum(dim=1)
    assert rows.tolist() == [0, 0, 0, 0, 40, 0, 0, 0, 0]


def test_no_tokens_give_no_rows() -> None:
    gate_up, down = weights(3, 64, 40)[0], weights(3, 40, 32)[0]
    ids, scales = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert moe_experts(numbers(0, 40, seed=1), ids, scales, gate_up, down).shape == (0, 40)
    assert gated_mlp(numbers(0, 40, seed=1), gate_up.matrix(0), down.matrix(0)).shape == (0, 40)
    assert headwise_linear(numbers(0, 3, 40, seed=1), gate_up).shape == (0, 3, 64)


@pytest.mark.thin(meet=2)
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "inner", "outs"), [(96, 64, 96), (50, 7, 33)])
def test_a_gated_mlp_matches_the_reference(
    fmt: str, group: int | None, dtype: torch.dtype, dim: int, inner: int, outs: int
) -> None:
    gate_up, exact_gate_up = weights(2 * inner, dim, fmt=fmt, group=group, seed=1)
    down, exact_down = weights(outs, inner, fmt=fmt, group=group, seed=2)
    for shape in [(1,), (3, 5), (70,), (600,)]:
        x, residual = numbers(*shape, dim, seed=3, dtype=dtype), numbers(*shape, outs, seed=4, dtype=dtype)
        inside = intermediate(x, exact_gate_up)
        expected, size = inside @ exact_down.T, inside.abs() @ exact_down.abs().T
        assert_close(gated_mlp(x, gate_up, down), expected, size)
        assert_close(gated_mlp(x, gate_up, down, residual=residual), expected + residual.double(), size)


def test_a_row_of_a_gated_mlp_does_not_depend_on_the_others_or_on_the_threads(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    gate_up, down = weights(192, 128)[0], weights(128, 96)[0]
    x = numbers(600, 128, seed=2)
    whole = on_threads(1, lambda: gated_mlp(x, gate_up, down))
    assert torch.equal(on_threads(3, lambda: gated_mlp(x, gate_up, down)), whole)
    assert torch.equal(gated_mlp(x[550:551], gate_up, down), whole[550:551])


@pytest.mark.thin(meet=2)
@every_format
@pytest.mark.parametrize(("heads", "outs", "dim"), [(1, 1, 1), (3, 33, 40), (16, 64, 32)])
def test_headwise_linear_multiplies_slices_into_slices(
    backend: str, fmt: str, group: int | None, heads: int, outs: int, dim: int
) -> None:
    weight, exact = weights(heads, outs, dim, fmt=fmt, group=group)
    exact = exact.view(heads, outs, dim)
    for tokens in (19,) if backend == "torch" else (1, 2, 19, 600):  # how many chooses kernels of ours alone
        for dtype in (torch.bfloat16, torch.float32):
            x = numbers(tokens, heads, dim + 3, seed=tokens, dtype=dtype)[..., 3:]
            expected = torch.einsum("thd,hod->tho", x.double(), exact)
            size = torch.einsum("thd,hod->tho", x.double().abs(), exact.abs())
            wider = torch.zeros(tokens, heads, outs + 4, dtype=dtype)
            out = headwise_linear(x, weight, out=wider[..., :outs])
            assert out.data_ptr() == wider.data_ptr()
            assert not wider[..., outs:].any()
            allowed = ROUNDING[dtype] * expected.abs() + 2**-17 * size
            assert ((wider[..., :outs].double() - expected).abs() <= allowed).all()
            assert torch.equal(headwise_linear(x, weight), wider[..., :outs])


def test_headwise_results_do_not_depend_on_other_tokens_or_on_the_threads(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    weight, x = weights(5, 96, 64)[0], numbers(40, 5, 64, seed=1)
    whole = on_threads(1, lambda: headwise_linear(x, weight))
    assert torch.equal(on_threads(3, lambda: headwise_linear(x, weight)), whole)
    assert torch.equal(headwise_linear(x[9:10], weight), whole[9:10])


def test_what_does_not_fit_is_refused() -> None:
    gate_up, down = weights(3, 64, 40)[0], weights(3, 40, 32)[0]
    x, ids, scales = numbers(2, 40, seed=1), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    for bad, message in [(4, "expert 4 of only 3"), (-1, "expert -1; experts count from 0")]:
        with pytest.raises(OpError, match=message):
            moe_experts(x, torch.full((2, 2), bad), scales, gate_up, down)
    with pytest.raises(OpError, match="expert 4 of only 4"):
        moe_experts(x, torch.full((2, 2), 4), scales, gate_up, down, num_zero_experts=1)
    with pytest.raises(OpError, match="moe_experts takes gate_up"):
        moe_experts(numbers(2, 41, seed=1), ids, scales, gate_up, down)
    with pytest.raises(OpError, match="moe_experts takes gate_up"):
        moe_experts(x, ids, scales, weights(3, 62, 40)[0], down)
    with pytest.raises(OpError, match="residual has shape"):
        moe_experts(x, ids, scales, gate_up, down, residual=x[:1])
    with pytest.raises(OpError, match="gated_mlp takes"):
        gated_mlp(x, gate_up, down)
    with pytest.raises(OpError, match="headwise_linear takes"):
        headwise_linear(numbers(2, 2, 40, seed=1), gate_up)
    with pytest.raises(OpError, match="out must be"):
        headwise_linear(numbers(2, 3, 40, seed=1), gate_up, out=torch.zeros(2, 3, 40))
