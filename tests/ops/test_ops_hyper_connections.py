"""Hyper-connections: their definition in float64, and tokens that depend on nothing but their own streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import StreamMix, collapse_streams, expand_streams, gate_streams, mix_streams, reference
from latentkv.ops.native.recording import Recording

pytestmark = pytest.mark.usefixtures("backend")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float64: 1e-12}
OPTIONS = {"norm_eps": 1e-3, "eps": 1e-2, "iterations": 3}


def case(tokens: int, count: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Streams, what they are mixed by, and what a block gives."""
    rows = (2 + count) * count
    weights = torch.randn(rows, count * dim) * 0.3, torch.randn(rows), torch.randn(3)
    return torch.randn(tokens, count, dim).to(dtype), *weights, torch.randn(tokens, dim).to(dtype)


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize(("count", "dim"), [(4, 48), (2, 7), (3, 33), (1, 16), (16, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_token_is_read_and_written_by_the_definition(dtype: torch.dtype, count: int, dim: int) -> None:
    streams, fn, base, scale, block = case(5, count, dim, dtype)
    mix = mix_streams(streams, fn, base, scale, **OPTIONS)
    read, written = collapse_streams(streams, mix.pre), expand_streams(streams, block, mix)
    assert read.dtype == written.dtype == dtype
    assert mix.comb is not None and {t.dtype for t in mix} == {torch.promote_types(dtype, torch.float32)}
    close = {"atol": TOLERANCE[dtype] * 4, "rtol": TOLERANCE[dtype]}
    for t in range(5):
        pre, post, comb = reference.mix_streams(streams[t], fn, base, scale, **OPTIONS)
        for got, expected in zip((part[t] for part in mix), (pre, post, comb), strict=True):
            torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(read[t].double(), reference.collapse_streams(streams[t], pre), **close)
        expected = reference.expand_streams(streams[t], block[t], post, comb)
        torch.testing.assert_close(written[t].double(), expected, **close)


def test_rows_and_columns_are_divided_as_often_as_asked() -> None:
    streams, *weights, _ = case(3, 4, 20)
    sums: list[float] = []
    for iterations in (1, 2, 20):
        comb = mix_streams(streams, *weights, norm_eps=1e-6, eps=1e-6, iterations=iterations).comb
        assert comb is not None
        torch.testing.assert_close(comb.sum(-2), torch.ones(3, 4), atol=1e-5, rtol=0)  # columns come last
        sums.append(float((comb.sum(-1) - 1).abs().max()))
    assert sums[0] > sums[1] > sums[2] and sums[2] < 1e-2


def test_a_stream_goes_into_the_stream_of_its_column() -> None:
    streams, comb = torch.randn(1, 3, 4), torch.zeros(1, 3, 3)
    comb[0, 0, 2] = 1  # the first stream into the last
    out = expand_streams(streams, torch.zeros(1, 4), StreamMix(torch.ones(1, 3), torch.ones(1, 3), comb))
    assert torch.equal(out[0, 2], streams[0, 0]) and not out[0, :2].any()


def test_without_a_mix_streams_stay_and_without_weights_their_mean_is_read() -> None:
    streams, block, post = torch.randn(4, 3, 21), torch.randn(4, 21), torch.rand(4, 3)
    out = expand_streams(streams, block, StreamMix(post, post, None))
    torch.testing.assert_close(out, streams + post[..., None] * block[:, None])
    torch.testing.assert_close(collapse_streams(streams), streams.mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gives_the_same_bits_alone_and_among_others(dtype: torch.dtype, backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's sums depend on how many there are")
    streams, *weights, block = case(9, 4, 40, dtype)

    def through(rows: slice) -> Tensor:
        with torch.inference_mode():
            mix = mix_streams(streams[rows], *weights, **OPTIONS)
            read = collapse_streams(streams[rows], mix.pre)
            return expand_streams(streams[rows], read + block[rows], mix)

    together = through(slice(None))
    assert all(torch.equal(through(slice(t, t + 1))[0], together[t]) for t in range(9))


def test_everything_has_gradients() -> None:
    streams, *weights, block = (tensor.requires_grad_() for tensor in case(2, 3, 8))
    mix = mix_streams(streams, *weights, **OPTIONS)
    (expand_streams(streams, block, mix) * collapse_streams(streams, mix.pre)[:, None]).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (streams, *weights, block))


def test_the_kernels_can_be_recorded(backend: str) -> None:
    if backend == "torch":
        pytest.skip("there are native calls to record only where the kernels run")
    streams, *weights, block = case(2, 4, 24, torch.bfloat16)
    with torch.inference_mode(), (recording := Recording()).record():
        mix = mix_streams(streams, *weights, **OPTIONS)
        read, written = collapse_streams(streams, mix.pre), expand_streams(streams, block, mix)
        mean = collapse_streams(streams)
    streams.copy_(torch.randn(2, 4, 24))
    recording.run()
    again = mix_streams(streams, *weights, **OPTIONS)
    assert torch.equal(read, collapse_streams(streams, again.pre)) and torch.equal(mean, collapse_streams(streams))
    assert torch.equal(written, expand_streams(streams, block, again))


def test_shapes_that_do_not_fit_are_refused() -> None:
    streams, fn, base, scale, block = case(2, 3, 8)
    mix = mix_streams(streams, fn, base, scale, **OPTIONS)
    with pytest.raises(OpError, match="fn has shape"):
        mix_streams(streams, fn[:-1], base, scale, **OPTIONS)
    with pytest.raises(OpError, match="not 0 times"):
        mix_streams(streams, fn, base, scale, norm_eps=1e-6, eps=1e-6, iterations=0)
    with pytest.raises(OpError, match="weights has shape"):
        collapse_streams(streams, mix.pre[:1])
    with pytest.raises(OpError, match="block has shape"):
        expand_streams(streams, block[:, 1:], mix)


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("count", "dim"), [(4, 48), (2, 7), (3, 33), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_independent_streams_are_gated_by_the_definition(dtype: torch.dtype, count: int, dim: int, groups: int) -> None:
    streams, rows = torch.randn(5, count, dim).to(dtype), groups * count
    weights = torch.randn(rows, count * dim) * 0.3, torch.randn(rows), torch.randn(groups)
    options = {"norm_eps": 1e-3, "eps": 1e-2, "magnitude": 1.7}
    gates = gate_streams(streams, *weights, **options)
    assert len(gates) == groups
    for t in range(5):
        expected = reference.gate_streams(streams[t], *weights, **options)
        for got, wanted in zip(gates, expected, strict=True):
            assert got.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(got[t].double(), wanted, atol=2e-5, rtol=2e-5)


def test_gates_of_a_token_have_the_same_bits_alone_and_among_others_and_gradients(backend: str) -> None:
    streams, fn, base, scale = torch.randn(9, 3, 40), torch.randn(6, 120) * 0.3, torch.randn(6), torch.randn(2)
    options = {"norm_eps": 1e-3, "eps": 1e-2, "magnitude": 1.7}
    if backend != "torch":
        with torch.inference_mode():
            together = gate_streams(streams, fn, base, scale, **options)
            for t in range(9):
                alone = gate_streams(streams[t : t + 1], fn, base, scale, **options)
                assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))
    inputs = [tensor.requires_grad_() for tensor in (streams, fn, base, scale)]
    sum(gate.square().sum() for gate in gate_streams(*inputs, **options)).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in inputs)


def test_gates_of_shapes_that_do_not_fit_are_refused() -> None:
    streams, fn, base = torch.randn(2, 3, 8), torch.randn(6, 24), torch.zeros(6)
    with pytest.raises(OpError, match="one scale or two, not 3"):
        gate_streams(streams, fn, base, torch.ones(3), norm_eps=1e-6, eps=1e-6)
    with pytest.raises(OpError, match="fn has shape"):
        gate_streams(streams, fn, base, torch.ones(1), norm_eps=1e-6, eps=1e-6)
