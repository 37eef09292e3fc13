"""`mla_prefill` on every instruction set against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import assert_meets_bar, tenth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentkv.errors import OpError
from latentkv.kernels import BF16_BACKENDS
from latentkv.ops import describe_backends, merge_states, mla_prefill, prefill, reference

pytestmark = pytest.mark.usefixtures("backend")


def ragged(
    q_lens: list[int], kv_lens: list[int], *, heads: int = 3, dim: int = 24, value_dim: int = 16, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q_start, kv_start = (torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()]) for lens in (q_lens, kv_lens))
    q = tenth((sum(q_lens), heads, dim), dtype, 1)
    k = tenth((sum(kv_lens), heads, dim), dtype, 2)
    v = tenth((sum(kv_lens), heads, value_dim), dtype, 3)
    return q, k, v, q_start, kv_start


@pytest.mark.thin(meet=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([40], [40]),  # all new
        ([7, 1, 30], [90, 33, 30]),  # a past, a decode step, all new
        ([5, 0, 4, 3], [2, 6, 0, 3]),  # more rows than keys, no rows, no keys
    ],
)
def test_ragged_prefill_meets_the_bar(dtype: torch.dtype, causal: bool, q_lens: list[int], kv_lens: list[int]) -> None:
    case = ragged(q_lens, kv_lens, dtype=dtype)
    out, lse = mla_prefill(*case, scale=5.0, causal=causal)
    assert out.dtype == dtype
    assert_meets_bar((out, lse), reference.mla_prefill(*case, scale=5.0, causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (24, 40), (16, 16), (32, 256), (40, 136)])
def test_keys_and_values_may_differ_in_width_either_way(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = ragged([20], [51], dim=dim, value_dim=value_dim, dtype=dtype)
    assert_meets_bar(mla_prefill(*case, scale=1.0), reference.mla_prefill(*case, scale=1.0))


def test_converting_some_heads_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged([20, 3], [50, 3], heads=5, dtype=torch.bfloat16)
    whole = mla_prefill(*case, scale=1.0)
    monkeypatch.setattr(prefill, "FLASH_NUMBERS", 50 * 24 * 2)  # two heads, then two, then one
    torch.testing.assert_close(mla_prefill(*case, scale=1.0), whole)


def test_float64_is_exact_over_several_blocks_and_chunks() -> None:
    case = ragged([1100], [1500], heads=8, dim=6, value_dim=4, dtype=torch.float64)
    for actual, expected in zip(mla_prefill(*case, scale=9.0), reference.mla_prefill(*case, scale=9.0), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_results_over_a_split_context_merge_to_the_whole(backend: str, dtype: torch.dtype) -> None:
    q, k, v, q_start, _ = ragged([9], [60], dtype=dtype)
    parts = [
        mla_prefill(
            q, k[a:b], v[a:b], q_start, torch.tensor([0, b - a]), scale=4.0, causal=b == 60, out_dtype=torch.float32
        )
        for a, b in [(0, 30), (30, 51), (51, 60)]
    ]
    merged = merge_states(*merge_states(*parts[0], *parts[1]), *parts[2])
    assert all(out.dtype == torch.float32 for out, _ in parts)
    expected = reference.mla_prefill(q, k, v, q_start, torch.tensor([0, 60]), scale=4.0)
    assert_meets_bar(merged, expected)
    if dtype == torch.bfloat16 and backend in BF16_BACKENDS:
        return  # weights are rounded to bf16 before they multiply the values
    for actual, exact in zip(merged, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_causal_prefill_is_that_of_plain_attention(dtype: torch.dtype) -> None:
    q, k, v, q_start, kv_start = ragged([12], [12], dtype=dtype)
    grads: list[tuple[Tensor, ...]] = []
    for fast in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        if fast:
            out, _ = mla_prefill(*leaves, q_start, kv_start, scale=3.0)
        else:
            heads_first = [t.transpose(0, 1) for t in leaves]
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=3.0)
            out = out.transpose(0, 1)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1])


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    dim=st.integers(1, 20),
    value_dim=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    causal=st.booleans(),
)
def test_any_lengths_and_widths_match_the_reference(
    lens: list[tuple[int, int]], dim: int, value_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    case = ragged([a for a, _ in lens], [b for _, b in lens], dim=dim, value_dim=value_dim, dtype=dtype)
    expected = reference.mla_prefill(*case, scale=2.0, causal=causal)
    result = mla_prefill(*case, scale=2.0, causal=causal)
    assert_meets_bar(result, expected)
    for actual, exact in zip(result, expected, strict=True) if dtype == torch.float32 else ():
        torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scores_of_a_whole_sequence_are_never_held(dtype: torch.dtype) -> None:
    tokens = 4096
    case = ragged([tokens], [tokens], heads=2, dim=8, value_dim=8, dtype=dtype)
    with LargestTensor() as largest:
        mla_prefill(*case, scale=1.0)
    assert largest.numel <= 4096 * 1024  # a block of query-head rows by a chunk of keys; all scores are 8 times that


def test_every_op_says_what_computes_it(backend: str) -> None:
    cpu = torch.device("cpu")
    assert ("flash" if backend == "torch" else backend) in describe_backends(cpu, torch.bfloat16)["mla_prefill"]
    assert "float64" in describe_backends(cpu, torch.float64)["mla_prefill"]


@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (1, torch.zeros(9, 3, 23), "k has shape"),
        (2, torch.zeros(8, 3, 16), "v has shape"),
        (3, torch.tensor([0, 8]), "q_start must rise"),
        (4, torch.tensor([0, 10]), "kv_start must rise"),
        (4, torch.tensor([0, 5, 9]), "same number of sequences"),
    ],
)
def test_what_does_not_fit_is_refused(index: int, replacement: Tensor, message: str) -> None:
    case = list(ragged([9], [9], dtype=torch.float32))
    case[index] = replacement
    with pytest.raises(OpError, match=message):
        mla_prefill(*case, scale=1.0)
