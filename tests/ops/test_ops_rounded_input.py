"""Products of quantised weights with activations of 8 bits, against float64 products of what both stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentkv import kernels
from latentkv.ops import gated_mlp, linear, moe_experts, reference
from latentkv.weights.activations import round_to_int8
from latentkv.weights.formats import CODE_FORMATS, INT8, INTEGER_PRODUCTS
from latentkv.weights.layout import PackedWeight, pack_weight
from latentkv.weights.weight import QuantizedWeight
from quantised_weights import quantised

FORMATS = [
    *[("int8", None), ("int8", 32), ("int8 f32", 64), ("int4", 32), ("int4 f16", 128), ("int4", None)],
    *[("uint2 f16", 16), ("uint4 f32", 32), ("uint4 f16", 64), ("uint5 f16", 32), ("int5 f16", 32), ("int6 f16", 16)],
    *[("int6 f16", 32), ("fp4", 32), ("nl4 f16", 32), ("nl4 f16", 64)],
]
SHAPES = [(1, 1), (17, 30), (33, 127), (64, 130), (96, 256), (40, 24)]
ROWS = [0, 1, 2, 3, 4, 5, 8, 9, 17, 64]

every_backend = pytest.mark.parametrize("backend", kernels.available_backends())
every_format = pytest.mark.parametrize(("fmt", "group"), FORMATS)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shape: int, fmt: str, group: int | None, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed weight that rounds its input, and what it stands for, float64."""
    integers = quantised(numbers(*shape, seed=seed, dtype=torch.bfloat16), fmt, group)
    packed = pack_weight(integers).rounding_input()
    assert packed.rounds_input
    return packed, integers.dequantize().double()


def assert_close(out: Tensor, x: Tensor, packed: PackedWeight, weight: Tensor) -> None:
    """Float32 sums of the products with rounded activations; of each run they are exact."""
    rounded = round_to_int8(x, packed.group).double()
    has_minima = CODE_FORMATS[packed.format].has_minima  # what is added to all codes, and nearly cancels
    size = rounded.abs() @ (weight.abs() + (weight.abs().amax() if has_minima else 0)).T
    assert ((out.double() - reference.linear(rounded, weight)).abs() <= 2e-6 * size).all()


def test_all_formats_of_integers_are_tried() -> None:
    assert {fmt.split()[0] for fmt, _ in FORMATS} == INTEGER_PRODUCTS


@pytest.mark.thin(meet=2)
@every_backend
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_rounded_activations(
    backend: kernels.Backend, fmt: str, group: int | None, dtype: torch.dtype
) -> None:
    with kernels.use_backend(backend):
        for out_features, in_features in SHAPES:
            packed, weight = weights(out_features, in_features, fmt=fmt, group=group)
            for rows in ROWS:
                x = numbers(rows, in_features, seed=rows, dtype=dtype)
                assert_close(linear(x, packed, out_dtype=torch.float32), x, packed, weight)


@every_backend
@every_format
def test_the_largest_codes_and_activations_do_not_overflow(
    backend: kernels.Backend, fmt: str, group: int | None
) -> None:
    packed, weight = weights(64, 256, fmt=fmt, group=group)
    ends = weight.sign()
    for extremes in (ends * weight.abs().amax(), -ends.abs() * weight.abs().amax()):
        integers = quantised(extremes.bfloat16(), fmt, group)
        packed = pack_weight(integers).rounding_input()
        with kernels.use_backend(backend):
            for x in (torch.full((5, 256), 3.0), torch.full((5, 256), -3.0), ends[:5].float()):
                assert_close(linear(x, packed), x, packed, integers.dequantize().double())


@every_backend
def test_codes_of_minus_128_are_exact_beside_activations_of_either_sign(backend: kernels.Backend) -> None:
    codes = torch.tensor([[-128] * 64, [127] * 64, [-128, 127] * 32], dtype=torch.int8)
    packed = pack_weight(QuantizedWeight(codes, torch.ones(3, 1, dtype=torch.bfloat16), INT8, 64)).rounding_input()
    signs = torch.tensor([[1.0] * 64, [-1.0] * 64, [1.0, -1.0] * 32])
    with kernels.use_backend(backend):
        assert torch.equal(linear(127 * signs, packed), 127 * signs @ codes.float().T)


@every_backend
@every_format
def test_a_row_depends_on_no_other_row_and_no_number_of_threads(
    backend: kernels.Backend, fmt: str, group: int | None
) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    packed, _ = weights(70, 256, fmt=fmt, group=group)
    x = numbers(100, 256, seed=1, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    with kernels.use_backend(backend):
        alone = torch.cat([linear(row, packed) for row in x.split(1)])
        try:
            for count, rows in ((1, 2), (2, 7), (3, 8), (1, 9), (2, 15), (3, 100)):
                torch.set_num_threads(count)
                assert torch.equal(linear(x[:rows], packed), alone[:rows])
        finally:
            torch.set_num_threads(threads)


@every_backend
def test_more_activations_than_the_cache_holds_change_no_bit(backend: kernels.Backend) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    packed, _ = weights(128, 4096, fmt="int4", group=128)
    x = numbers(300, 4096, seed=1, dtype=torch.bfloat16)
    with kernels.use_backend(backend):
        assert torch.equal(torch.cat([linear(part, packed) for part in x.split(8)]), linear(x, packed))


@every_backend
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("fmt", ["int8", "uint4 f16", "nl4 f16"])
def test_what_is_not_finite_stays_visible_in_its_row(backend: kernels.Backend, fmt: str, bad: float) -> None:
    packed, weight = weights(50, 96, fmt=fmt, group=32)
    x = numbers(4, 96, seed=1)
    x[1, 40] = bad
    with kernels.use_backend(backend):
        out = linear(x, packed)
    assert out[1].isnan().all()
    assert_close(out[[0, 2, 3]], x[[0, 2, 3]], packed, weight)


@every_backend
def test_zeros_and_the_smallest_and_largest_numbers_are_multiplied(backend: kernels.Backend) -> None:
    packed, weight = weights(50, 32, fmt="int8", group=None)
    x = torch.stack([torch.zeros(32), torch.full((32,), 1e-38), torch.full((32,), 1e-25), torch.full((32,), 1e30)])
    with kernels.use_backend(backend):
        out = linear(x, packed)
    assert not out[:2].any()
    assert_close(out[2:], x[2:], packed, weight)


@every_backend
@pytest.mark.parametrize(("fmt", "group"), [("int4", 32), ("uint4 f16", 32)])
def test_experts_and_mlps_round_both_of_their_inputs(backend: kernels.Backend, fmt: str, group: int) -> None:
    gate_up, wide = weights(3, 128, 96, fmt=fmt, group=group)
    down, narrow = weights(3, 96, 64, fmt=fmt, group=group, seed=1)
    x, ids = numbers(6, 96, seed=2), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2], [2, 0]])
    chosen = torch.rand(6, 2, generator=torch.Generator().manual_seed(3))

    def one(row: Tensor, expert: int) -> Tensor:
        product = reference.linear(round_to_int8(row, group), wide[expert])
        return reference.linear(round_to_int8(reference.silu_mul(product).float(), group), narrow[expert])

    of_all = torch.stack([torch.stack([one(row, expert) for expert in range(3)]) for row in x])
    expected = (chosen[:, :, None] * of_all.gather(1, ids[:, :, None].expand(-1, -1, 96))).sum(1)
    with kernels.use_backend(backend):
        out = moe_experts(x, ids, chosen, gate_up, down)
        single = gated_mlp(x, gate_up.matrix(1), down.matrix(1))
        # A zero expert gives what was not rounded.
        beside = moe_experts(x, torch.stack([ids[:, 0], ids[:, 0] + 3], 1), chosen, gate_up, down, num_zero_experts=3)
        alone = moe_experts(x, ids[:, :1], chosen[:, :1], gate_up, down)
        none = moe_experts(x, ids + 3, chosen, gate_up, down, num_zero_experts=3)
    torch.testing.assert_close(beside, alone + chosen[:, 1:] * x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(none, chosen.sum(1, keepdim=True) * x, atol=1e-6, rtol=1e-6)
    # Where a number of an intermediate lies between two integers, a token may differ by a step of its run, but few do.
    largest = of_all.abs().amax()
    step = reference.silu_mul(reference.linear(x, wide[0])).abs().amax() / 127 * narrow.abs().amax()
    for found, wanted in ((out, expected), (single, of_all[:, 1])):
        differences = (found.double() - wanted).abs().amax(1)
        assert differences.amax() <= 2 * step
        assert (differences <= 1e-5 * largest).sum() >= 4
