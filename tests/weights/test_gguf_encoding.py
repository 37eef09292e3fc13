"""Blocks that are made are what the gguf package reads, and err no more than plain rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from latentkv.errors import OpError
from latentkv.weights.gguf.encoding import WRITTEN, encode
from latentkv.weights.gguf.types import dequantize

EVERY = pytest.mark.parametrize("name", WRITTEN)
PACKED = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K", "MXFP4")
# Relative error on normal weights of llama.cpp's own quantisers (quantize_q4_K and quantize_q6_K of its library).
OF_LLAMA_CPP = {"Q4_K": 0.07159, "Q6_K": 0.01777}


def weights(rows: int, width: int, kind: str = "normal") -> Tensor:
    found = torch.randn(rows, width)
    if kind == "heavy":
        found = found / torch.rand(rows, width).clamp_(min=0.05)
    return found * 0.02


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@EVERY
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_gguf_package_reads_what_is_meant(name: str, kind: str) -> None:
    raw = encode(weights(7, 1024, kind), WRITTEN[name])
    theirs = gguf.quants.dequantize(raw.numpy(), GGMLQuantizationType(WRITTEN[name].id))
    ours = dequantize(raw, WRITTEN[name])
    assert torch.equal(ours.view(torch.int32), torch.from_numpy(theirs.copy()).view(torch.int32))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "MXFP4"])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_no_block_errs_more_than_the_gguf_packages_own(name: str, kind: str) -> None:
    exact, number = weights(32, 1024, kind), GGMLQuantizationType(WRITTEN[name].id)
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(exact.numpy(), number), number).copy())
    ours = dequantize(encode(exact, WRITTEN[name]), WRITTEN[name])
    mine, other = ((found - exact).view(-1, 32).square().sum(1) for found in (ours, theirs))
    assert bool((mine <= other * 1.0001).all())
    assert error(ours, exact) < error(theirs, exact)


@pytest.mark.parametrize("name", OF_LLAMA_CPP)
def test_k_types_err_less_than_llama_cpps_own(name: str) -> None:
    exact = weights(64, 2048)
    found = dequantize(encode(exact, WRITTEN[name]), WRITTEN[name])
    assert error(found, exact) < OF_LLAMA_CPP[name]


@EVERY
def test_what_a_type_can_hold_comes_back(name: str) -> None:
    first = weights(4, 512)
    held = dequantize(encode(first, WRITTEN[name]), WRITTEN[name])
    again = dequantize(encode(held, WRITTEN[name]), WRITTEN[name])
    # The scales that were found once are found again nearly, for few are tried.
    assert error(again, held) <= 0.2 * error(held, first)


@EVERY
def test_zeros_constants_and_single_numbers_are_held(name: str) -> None:
    rows = torch.zeros(5, 512)
    rows[1], rows[2], rows[3, 17], rows[4, ::2] = 0.5, -0.25, 3.0, 1e-9
    found = dequantize(encode(rows, WRITTEN[name]), WRITTEN[name])
    assert bool(torch.isfinite(found).all()) and not found[0].any()
    assert error(found[1:4], rows[1:4]) < 0.02
    assert float(found[4].abs().max()) <= 2e-9


@pytest.mark.parametrize("name", PACKED)
def test_columns_that_count_more_err_less(name: str) -> None:
    exact, importance = weights(64, 512), torch.ones(512)
    importance[torch.randperm(512)[:48]] = 100.0
    plain, weighted = (dequantize(encode(exact, WRITTEN[name], each), WRITTEN[name]) for each in (None, importance))

    def weighted_error(found: Tensor) -> float:
        return float(((found - exact).square() * importance).sum())

    assert weighted_error(weighted) < 0.97 * weighted_error(plain)
    same = dequantize(encode(exact, WRITTEN[name], torch.ones(512)), WRITTEN[name])
    assert error(same, plain) < 1e-3


def test_rows_are_made_by_themselves_however_many_there_are() -> None:
    exact = weights(40, 8192)
    for name in PACKED:
        whole = encode(exact, WRITTEN[name])
        assert torch.equal(whole[33:34], encode(exact[33:34], WRITTEN[name]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F16"])
def test_what_is_no_number_or_too_large_is_refused(name: str, bad: float) -> None:
    rows = weights(3, 256)
    rows[1, 3] = bad
    with pytest.raises(OpError, match=f"NaN or infinite values, or some too large for {name}"):
        encode(rows, WRITTEN[name])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OpError, match=r"rows of Q4_K take \[rows, a multiple of 256\]"):
        encode(weights(2, 128), WRITTEN["Q4_K"])
    with pytest.raises(OpError, match="importance is one number a column"):
        encode(weights(2, 256), WRITTEN["Q4_K"], torch.ones(2))


def test_bf16_is_rounded_to_nearest() -> None:
    exact = weights(2, 64)
    found = encode(exact, WRITTEN["BF16"]).numpy().view(np.uint16).astype(np.uint32) << 16
    assert torch.equal(torch.from_numpy(found.view(np.float32)), exact.bfloat16().float())
