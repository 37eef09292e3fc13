"""`linear` on packed weights against the definition in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops import linear, output_logits, reference
from latentkv.weights.formats import INT8
from latentkv.weights.layout import PackedWeight, pack_weight
from latentkv.weights.weight import QuantizedWeight
from quantised_weights import quantised

FORMATS = [
    *[("bf16", None), ("compact", None), ("int8", None), ("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)],
    *[("int8 f16", 32), ("int4 f16", 32), ("uint2 f16", 16), ("uint4 f16", 32), ("uint4 f32", 32)],
    *[("uint5 f16", 32), ("int5 f16", 32), ("int6 f16", 16), ("int8 f32", 64)],
    *[("fp4", 32), ("nl4 f16", 32), ("fp8 f32", 128), ("fp8", None)],
]
SHAPES = [(1, 1), (17, 30), (33, 127), (64, 130), (96, 256), (40, 1)]
ROWS = [0, 1, 2, 3, 5, 8, 9, 14, 15, 16, 17, 64, 300]
ROWS_OF_TORCH = [0, 1, 17, 300]
"""How many there are chooses a kernel of ours, and nothing where torch multiplies what was unpacked."""

TOLERANCE = 2e-6
"""Of |x| |W|: float32 sums of exact products, whatever x is."""

every_backend = pytest.mark.parametrize("backend", kernels.available_backends())
every_format = pytest.mark.parametrize(("fmt", "group"), FORMATS)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def weights(*shape: int, fmt: str, group: int | None, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A packed weight and what it stands for, float64; packed alike for every instruction set."""
    weight = numbers(*shape, seed=seed, dtype=torch.bfloat16)
    if fmt == "compact":
        weight.view(-1)[3::997] = 0  # with what is tiny, exceptions
        weight.view(-1)[500::997] *= 1e-20
    if fmt in ("bf16", "compact"):
        packed = pack_weight(weight, compact=fmt == "compact")
        assert weight.numel() < 4096 or kernels.extension is None or packed.format == fmt
        return packed, weight.double()
    integers = quantised(weight, fmt, group)
    return pack_weight(integers), integers.dequantize().double()


def assert_close(out: Tensor, x: Tensor, weight: Tensor, added: tuple[Tensor, ...] = ()) -> None:
    expected = reference.linear(x, weight, *added)
    size = x.double().abs() @ weight.abs().T + sum((t.double().abs() for t in added), torch.zeros(()))
    assert ((out.double() - expected).abs() <= TOLERANCE * size).all()


@pytest.mark.thin(meet=2)
@every_backend
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_is_the_product_with_what_was_packed(
    backend: kernels.Backend, fmt: str, group: int | None, dtype: torch.dtype
) -> None:
    with kernels.use_backend(backend):
        for out_features, in_features in SHAPES:
            packed, weight = weights(out_features, in_features, fmt=fmt, group=group)
            for rows in ROWS_OF_TORCH if backend == "torch" else ROWS:
                x = numbers(rows, in_features, seed=rows, dtype=dtype)
                assert_close(linear(x, packed, out_dtype=torch.float32), x, weight)


@every_backend
@every_format
def test_bias_and_residual_are_added_in_float32_and_rounded_once(
    backend: kernels.Backend, fmt: str, group: int | None
) -> None:
    packed, weight = weights(50, 96, fmt=fmt, group=group)
    x = numbers(2, 3, 96, seed=1, dtype=torch.bfloat16)
    bias, residual = numbers(50, seed=2), numbers(2, 3, 50, seed=3, dtype=torch.bfloat16)
    with kernels.use_backend(backend):
        exact = linear(x, packed, bias, residual=residual, out_dtype=torch.float32)
        rounded = linear(x, packed, bias, residual=residual)
    assert_close(exact, x, weight, (bias, residual))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


@every_backend
@every_format
def test_an_outlier_does_not_drown_its_neighbours(backend: kernels.Backend, fmt: str, group: int | None) -> None:
    packed, weight = weights(64, 256, fmt=fmt, group=group)
    x = numbers(5, 256, seed=1, dtype=torch.bfloat16)
    x[:, 100] *= 1000
    with kernels.use_backend(backend):
        assert_close(linear(x, packed, out_dtype=torch.float32), x, weight)


@every_backend
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_the_other_rows(
    backend: kernels.Backend, fmt: str, group: int | None, dtype: torch.dtype
) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    packed, _ = weights(70, 256, fmt=fmt, group=group)
    x = numbers(100, 256, seed=1, dtype=dtype)
    with kernels.use_backend(backend):
        alone = torch.cat([linear(row, packed) for row in x.split(1)])
        for rows in (2, 7, 8, 9, 15, 100):
            assert torch.equal(linear(x[:rows], packed), alone[:rows])


@every_backend
@pytest.mark.parametrize(("outs", "ins", "rows"), [(32, 1024, 6), (32, 1024, 20), (32, 1024, 40), (576, 256, 150)])
def test_more_threads_than_there_is_work_to_share_are_fine(
    backend: kernels.Backend, outs: int, ins: int, rows: int
) -> None:
    packed, weight = weights(outs, ins, fmt="bf16", group=None)
    x = numbers(rows, ins, seed=1, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    with kernels.use_backend(backend):
        try:
            for count in (3, 4, 16):
                torch.set_num_threads(count)
                assert_close(linear(x, packed, out_dtype=torch.float32), x, weight)
        finally:
            torch.set_num_threads(threads)


@every_backend
@every_format
def test_the_number_of_threads_changes_no_bit(backend: kernels.Backend, fmt: str, group: int | None) -> None:
    packed, _ = weights(200, 256, fmt=fmt, group=group)
    x = numbers(33, 256, seed=1, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    results: list[Tensor] = []
    with kernels.use_backend(backend):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(linear(x, packed))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@every_format
def test_calls_from_several_python_threads_give_the_same_bits(fmt: str, group: int | None) -> None:
    packed, _ = weights(200, 256, fmt=fmt, group=group)
    inputs = [numbers(1 + 7 * i, 256, seed=i, dtype=torch.bfloat16) for i in range(8)]
    expected = [linear(x, packed) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for out, same in zip(pool.map(lambda x: linear(x, packed), inputs), expected, strict=True):
                assert torch.equal(out, same)


@every_backend
@every_format
def test_one_of_stacked_matrices_is_the_same_as_packed_alone(
    backend: kernels.Backend, fmt: str, group: int | None
) -> None:
    packed, weight = weights(3, 50, 96, fmt=fmt, group=group)
    x = numbers(4, 96, seed=1, dtype=torch.bfloat16)
    with kernels.use_backend(backend):
        for e in range(3):
            assert_close(linear(x, packed.matrix(e), out_dtype=torch.float32), x, weight[e])


@every_backend
def test_strided_rows_are_read_in_place(backend: kernels.Backend) -> None:
    packed, weight = weights(50, 96, fmt="bf16", group=None)
    wide = numbers(7, 200, seed=1, dtype=torch.bfloat16)
    for x in (wide[:, 50:146], wide[:, ::2][:, :96], wide.T[:96, :].T):
        with kernels.use_backend(backend):
            assert_close(linear(x, packed, out_dtype=torch.float32), x, weight)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_infinity_and_nan_stay_in_their_rows(backend: kernels.Backend, dtype: torch.dtype) -> None:
    packed, weight = weights(50, 30, fmt="bf16", group=None)
    x = numbers(4, 30, seed=1, dtype=dtype)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    with kernels.use_backend(backend):
        out = linear(x, packed, out_dtype=torch.float32)
    assert out[1].isnan().all()
    assert torch.equal(out[2], weight[:, 3].sign().float() * float("inf"))
    assert_close(out[[0, 3]], x[[0, 3]], weight)


@every_backend
@every_format
def test_packed_logits_are_float32(backend: kernels.Backend, fmt: str, group: int | None) -> None:
    packed, weight = weights(99, 64, fmt=fmt, group=group)
    x = numbers(3, 64, seed=1, dtype=torch.bfloat16)
    with kernels.use_backend(backend):
        logits = output_logits(x, packed)
    assert logits.dtype == torch.float32
    assert_close(logits, x, weight)


def test_gradients_flow_to_x_through_a_packed_weight() -> None:
    packed, weight = weights(50, 30, fmt="int8", group=None)
    x = numbers(4, 30, seed=1).requires_grad_()
    linear(x, packed).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), weight.sum(0).expand(4, 30), rtol=1e-5)


def test_codes_of_minus_128_are_exact() -> None:
    codes = torch.tensor([[-128, 127, -127, 0]], dtype=torch.int8)
    packed = pack_weight(QuantizedWeight(codes, torch.ones(1, 1, dtype=torch.bfloat16), INT8, 4))
    for backend in kernels.available_backends():
        with kernels.use_backend(backend):
            assert linear(torch.eye(4, dtype=torch.bfloat16), packed).flatten().tolist() == codes.flatten().tolist()


@every_backend
@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compact_weight_is_multiplied_as_it_was(backend: kernels.Backend, rows: int, dtype: torch.dtype) -> None:
    if kernels.extension is None:
        pytest.skip("only the extension packs compact weights")
    weight = numbers(64, 256, seed=0, dtype=torch.bfloat16)
    weight.view(-1)[::2000] = torch.tensor([0, -3e-5, 1e-20, -1e20, 7e30, 1e-5, -2e-9, 2.0, 0]).bfloat16()
    packed = pack_weight(weight, compact=True)
    assert packed.format == "compact"
    assert packed.group >= 3
    with kernels.use_backend(backend):
        columns = [linear(x, packed, out_dtype=torch.float32) for x in torch.eye(256, dtype=dtype).split(rows)]
    assert torch.equal(torch.cat(columns), weight.float().T)


@every_backend
def test_a_window_of_the_smallest_numbers_is_multiplied_as_it_was(backend: kernels.Backend) -> None:
    bits = torch.arange(1 << 7, 16 << 7)
    weight = torch.cat([bits, bits | 1 << 15, torch.zeros(256, dtype=torch.int64)]).to(torch.int16).view(torch.bfloat16)
    weight = weight.repeat(2).view(32, 256).clone()
    weight[5, 7] = 3
    packed = pack_weight(weight, compact=True)
    assert kernels.extension is None or (packed.format, packed.group) == ("compact", 1)
    with kernels.use_backend(backend):
        product = linear(torch.eye(256, dtype=torch.bfloat16), packed, out_dtype=torch.float32)
    assert torch.equal(product, weight.float().T)


@every_backend
@pytest.mark.parametrize("fmt", ["bf16", "compact"])
def test_an_infinite_activation_gives_infinities_or_nan_where_a_weight_is_listed(
    backend: kernels.Backend, fmt: str
) -> None:
    weight = numbers(32, 256, seed=0, dtype=torch.bfloat16).clamp(-3, 3)
    weight = torch.where(weight.abs() < 2**-12, 2**-12, weight)
    weight[4, 9] = 1e-20
    packed = pack_weight(weight, compact=fmt == "compact")
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, 9] = float("inf")
    with kernels.use_backend(backend):
        (product,) = linear(x, packed, out_dtype=torch.float32)
    expected = weight[:, 9].float() * float("inf")
    if packed.format == "compact" and backend != "torch":
        expected[4] = float("nan")
    torch.testing.assert_close(product, expected, equal_nan=True)


@every_backend
@pytest.mark.parametrize("fmt", ["bf16", "compact", "int8"])
def test_more_activations_than_the_cache_holds_change_no_bit(backend: kernels.Backend, fmt: str) -> None:
    if backend == "torch":
        pytest.skip("torch's products depend on the number of rows")
    ins = 8192
    rows = 40 + 2**22 // (
        ins * (2 if backend in kernels.BF16_BACKENDS else 4)
    )  # beyond what passes by each block at once
    packed, _ = weights(256, ins, fmt=fmt, group=None)
    x = numbers(rows, ins, seed=1, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    with kernels.use_backend(backend):
        try:
            torch.set_num_threads(1)
            together = linear(x, packed)
            assert torch.equal(torch.cat([linear(part, packed) for part in x.split(8)]), together)
        finally:
            torch.set_num_threads(threads)


@every_backend
def test_a_compact_weight_without_exceptions_gives_the_bits_of_the_plain_one(backend: kernels.Backend) -> None:
    weight = numbers(70, 250, seed=0, dtype=torch.bfloat16).clamp(-0.9, 0.9)
    weight = torch.where(weight.abs() < 2**-12, 2**-12, weight)
    plain, packed = pack_weight(weight), pack_weight(weight, compact=True)
    assert packed.group == 0
    x = numbers(100, 250, seed=1, dtype=torch.bfloat16)
    with kernels.use_backend(backend):
        for rows in (1, 2, 9, 40, 100):
            assert torch.equal(linear(x[:rows], packed), linear(x[:rows], plain))


def test_what_does_not_fit_is_refused() -> None:
    packed, _ = weights(3, 50, 96, fmt="bf16", group=None)
    one = packed.matrix(0)
    x = torch.zeros(2, 96)
    with pytest.raises(OpError, match=r"x \[\.\.\., D\]"):
        linear(torch.zeros(2, 95), one)
    with pytest.raises(OpError, match=r"3 of \[50, 96\]"):
        linear(x, packed)
    with pytest.raises(OpError, match="bias"):
        linear(x, one, torch.zeros(49))
    with pytest.raises(OpError, match="residual"):
        linear(x, one, residual=torch.zeros(1, 50))
    with pytest.raises(OpError, match="residual"):
        linear(x, torch.zeros(50, 96), residual=torch.zeros(1, 50))
