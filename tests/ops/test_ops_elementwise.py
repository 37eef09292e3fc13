"""`rms_norm`, `apply_rope` and `silu_mul` against the float64 reference, gradients included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from latentkv import kernels
from latentkv.errors import OpError
from latentkv.ops import (
    SwigluLimit,
    apply_rope,
    gate_heads,
    gated_rms_norm,
    norm_beside,
    reference,
    rms_norm,
    silu_mul,
    sink_heads,
)


@pytest.fixture(params=kernels.available_backends(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param):
        yield request.param


def angles(tokens: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    phase = torch.arange(tokens)[:, None].double() / 10 ** torch.linspace(0, 3, half).double()
    return phase.cos().to(dtype), phase.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_matches_the_reference(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(4, 7, 33) * 50).to(dtype), torch.randn(33).to(dtype)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(normed.double(), reference.rms_norm(x, weight, 1e-5), atol=tolerance, rtol=tolerance)


def test_rms_norm_rounds_the_normed_numbers_before_the_weight_as_checkpoints_were_trained() -> None:
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    exact = reference.rms_norm(x, torch.ones(32), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), weight * exact.float().bfloat16())


def test_rms_norm_of_large_float16_numbers_does_not_overflow() -> None:
    x = torch.full((1, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(8).half(), 1e-6), torch.ones(1, 8).half())


def test_rms_norm_keeps_the_dtype_of_x_under_a_float32_weight() -> None:
    assert rms_norm(torch.randn(2, 4).bfloat16(), torch.ones(4), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 33)])
def test_a_norm_beside_what_it_is_of(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(*shape), torch.randn(33)
    assert torch.equal(norm_beside(x, weight, 1e-5), torch.cat([rms_norm(x, weight, 1e-5), x], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("dim", "rank"), [(40, 16), (37, 5), (300, 21)])
def test_a_norm_that_gates_itself_matches_the_reference_for_each_row_alone(
    dtype: torch.dtype, dim: int, rank: int
) -> None:
    x = torch.randn(6, 2 * dim).to(dtype)[:, :dim]
    weight, down, up = (torch.randn(*shape).to(dtype) / 3 for shape in ((dim,), (rank, dim), (dim, rank)))
    gated = gated_rms_norm(x, weight, 1e-5, down, up)
    assert gated.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float64: 1e-13}[dtype]
    expected = reference.gated_rms_norm(x, weight, 1e-5, down, up)
    torch.testing.assert_close(gated.double(), expected, atol=tolerance, rtol=tolerance)
    if kernels.native_isa() is not None and dtype != torch.float64:
        assert torch.equal(torch.cat([gated_rms_norm(row[None], weight, 1e-5, down, up) for row in x]), gated)


def test_a_norm_that_gates_itself_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(OpError, match="gated_rms_norm takes"):
        gated_rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, torch.ones(3, 8), torch.ones(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_may_lie_beside_what_else_was_projected_with_it(dtype: torch.dtype) -> None:
    x, joined = torch.randn(5, 3, 21).to(dtype), torch.randn(5, 3, 40).to(dtype)
    gate = joined[..., 19:]
    expected = x.double() * gate.double().sigmoid()
    for given in (gate, gate.flatten(1)):
        gated = gate_heads(x.clone(), given)
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(gated.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(9, 12), (9, 3, 12), (9, 2, 3, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rope_matches_the_reference(interleaved: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape).to(dtype)
    cos, sin = angles(9, 6, torch.float64 if dtype == torch.float64 else torch.float32)
    between = (1,) * (x.ndim - 2)
    turned = apply_rope(x, cos.view(9, *between, 6), sin.view(9, *between, 6), interleaved=interleaved)
    assert turned.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14}[dtype]
    expected = reference.apply_rope(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(turned.double(), expected, atol=tolerance, rtol=tolerance)


def test_rope_broadcasts_its_angles_over_a_batch() -> None:
    x, (cos, sin) = torch.randn(2, 9, 3, 12), angles(9, 6)
    batched = apply_rope(x, cos[None, :, None], sin[None, :, None], interleaved=True)
    for row, expected in zip(batched, x, strict=True):
        torch.testing.assert_close(row, apply_rope(expected, cos[:, None], sin[:, None], interleaved=True))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_makes_scores_depend_on_distance_only(interleaved: bool) -> None:
    q, k, (cos, sin) = torch.randn(8).double(), torch.randn(8).double(), angles(20, 4, torch.float64)
    turned_q = apply_rope(q.expand(20, 8), cos, sin, interleaved=interleaved)
    turned_k = apply_rope(k.expand(20, 8), cos, sin, interleaved=interleaved)
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[5:].diagonal(), scores[5, 0].expand(15))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [3, 64, 201, 2048])
def test_rms_norm_of_a_slice_is_within_one_rounding_of_torchs(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(5, dim + 9).to(dtype)[:, 4 : 4 + dim]
    for weight in (torch.randn(dim).to(dtype), torch.randn(dim)):
        with kernels.use_backend("torch"):
            expected = rms_norm(x, weight, 1e-5)
        # The normed number may fall to the other side of one rounding, and its product with the weight with it.
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dim", [3, 64, 201, 2048])
def test_rms_norm_of_a_float32_slice_matches_the_reference(dim: int) -> None:
    x, weight = torch.randn(5, dim + 9)[:, 4 : 4 + dim], torch.randn(dim)
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("half", [1, 6, 32])
def test_rope_of_a_slice_into_a_slice_equals_torchs_bit_for_bit(
    dtype: torch.dtype, interleaved: bool, half: int
) -> None:
    x, (cos, sin) = torch.randn(300, 2, 5 + 2 * half).to(dtype)[..., 5:], angles(300, half)
    with kernels.use_backend("torch"):
        expected = apply_rope(x, cos[:, None], sin[:, None], interleaved=interleaved)
    wider = torch.zeros(300, 2, 7 + 2 * half, dtype=dtype)
    out = apply_rope(x, cos[:, None], sin[:, None], interleaved=interleaved, out=wider[..., 7:])
    assert out.data_ptr() == wider[..., 7:].data_ptr()
    assert torch.equal(wider[..., 7:], expected)
    assert not wider[..., :7].any()
    apply_rope(x, cos[:, None], sin[:, None], interleaved=interleaved, out=x)
    assert torch.equal(x, expected)
    key = apply_rope(wider[:, 0, 7:], cos, sin, interleaved=interleaved)
    with kernels.use_backend("torch"):
        assert torch.equal(key, apply_rope(wider[:, 0, 7:], cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 2, 70), (40, 2816)])
def test_silu_mul_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = (torch.randn(*shape) * 3).to(dtype)
    out = silu_mul(gate_up)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(out.double(), reference.silu_mul(gate_up), atol=tolerance, rtol=tolerance)


def test_silu_of_the_largest_numbers_is_theirs_or_nothing() -> None:
    gate = torch.tensor([100.0, 1e30, -100.0, -1e30, 0.0])
    out = silu_mul(torch.cat([gate, torch.ones(5)]))
    torch.testing.assert_close(out, torch.tensor([100.0, 1e30, 0.0, 0.0, 0.0]))
    assert silu_mul(torch.tensor([float("nan"), 1.0])).isnan().all()


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = float("nan")
    rows = rms_norm(x, torch.ones(40), 1e-6).isnan().sum(dim=1)
    assert rows.tolist() == [0, 40, 0]


def test_gradients_are_right() -> None:
    x, weight = torch.randn(3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    cos, sin = angles(3, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    for interleaved in (True, False):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: apply_rope(x, cos, sin, interleaved=i), (x,))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OpError, match=r"rms_norm takes weight \[3\]"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-6)
    with pytest.raises(OpError, match="even R"):
        apply_rope(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 1), interleaved=True)
    with pytest.raises(OpError, match="broadcast"):
        apply_rope(torch.zeros(2, 1, 4), torch.zeros(3, 2), torch.zeros(3, 2), interleaved=True)
    with pytest.raises(OpError, match="out must be"):
        apply_rope(torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2), interleaved=True, out=torch.zeros(2, 6))
    with pytest.raises(OpError, match="side by side"):
        silu_mul(torch.zeros(2, 3))


@pytest.mark.parametrize("limit", [SwigluLimit(1.5), SwigluLimit(1.5, bounds_gate=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_silu_mul_with_a_limit_bounds_both_factors(dtype: torch.dtype, limit: SwigluLimit) -> None:
    gate_up = (torch.randn(5, 66) * 4).to(dtype)
    out = silu_mul(gate_up, limit)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(out.double(), reference.silu_mul(gate_up, limit), atol=tolerance, rtol=tolerance)
    assert out.abs().max() <= 1.5**2 and out.dtype == dtype
    assert not torch.equal(out, silu_mul(gate_up))
    other = silu_mul(gate_up, limit._replace(bounds_gate=not limit.bounds_gate))
    assert float((out - other).abs().max()) > 0.2  # silu(1.5) = 1.23


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("shape", [(9, 3, 20), (2, 5, 3, 16), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gate_heads_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...], each: bool) -> None:
    x, gate = (
        torch.randn(shape).to(dtype),
        (torch.randn(*shape[:-2], shape[-2] * (shape[-1] if each else 1)) * 5).to(dtype),
    )
    expected = reference.gate_heads(x, gate)
    out = gate_heads(x.clone(), gate)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_gate_heads_takes_slices_of_wider_tensors() -> None:
    wide, gates = torch.randn(4, 3, 24), torch.randn(4, 9)
    expected = reference.gate_heads(wide[..., :16], gates[:, 3:6])
    torch.testing.assert_close(gate_heads(wide.clone()[..., :16], gates[:, 3:6]).double(), expected)


def test_gate_heads_has_gradients() -> None:
    x, gate = torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    gate_heads(x, gate).sum().backward()
    assert x.grad is not None and gate.grad is not None


@pytest.mark.parametrize("gate", [(4, 2), (3, 3), (4, 24)])
def test_gates_that_do_not_fit_are_refused(gate: tuple[int, ...]) -> None:
    with pytest.raises(OpError, match="gate_heads"):
        gate_heads(torch.randn(4, 3, 7), torch.randn(gate))


@pytest.mark.parametrize("shape", [(9, 3, 20), (2, 5, 3, 16), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sink_is_one_more_number_in_the_sum_of_a_softmax(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, lse, sinks = torch.randn(shape).to(dtype), torch.randn(shape[:-1]).to(wide) * 3, torch.randn(shape[-2]) * 3
    expected = reference.sink_heads(x, lse, sinks)
    got = sink_heads(x, lse, sinks)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_sinks_leave_nothing_of_what_read_nothing_and_must_fit_the_heads() -> None:
    x, lse = torch.randn(2, 3, 8), torch.tensor([[0.0, 50.0, float("-inf")]] * 2)
    got = sink_heads(x.clone(), lse, torch.tensor([0.0, -50.0, 0.0]))
    torch.testing.assert_close(got[:, :2], x[:, :2] * torch.tensor([0.5, 1.0])[:, None])
    assert not got[:, 2].any()
    with pytest.raises(OpError, match="sinks has shape"):
        sink_heads(x, lse, torch.zeros(2))
    with pytest.raises(OpError, match="lse has shape"):
        sink_heads(x, lse[:1], torch.zeros(3))
