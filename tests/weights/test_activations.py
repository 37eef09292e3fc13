"""How activations are rounded to 8 bits."""

from __future__ import annotations

import torch

from latentkv.weights.activations import RUN, round_to_int8
from latentkv.weights.formats import FP8, INT8
from latentkv.weights.layout import pack_weight
from latentkv.weights.weight import quantize_weight
from quantised_weights import quantised


def test_each_run_has_the_scale_of_its_largest_number() -> None:
    x = torch.tensor([[1.27, -0.01, 0.005, *[0.0] * (RUN - 3), 127.0, 1.4, -2.6, *[0.0] * (RUN - 3)]])
    rounded = round_to_int8(x, 2 * RUN)
    torch.testing.assert_close(rounded[0, :3], torch.tensor([1.27, -0.01, 0.0]), rtol=0, atol=0.00501)
    assert rounded[0, RUN : RUN + 3].tolist() == [127.0, 1.0, -3.0]


def test_groups_of_weights_share_no_scale_and_are_cut_into_runs() -> None:
    x = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(0))
    x[..., 40:48] *= 1000
    rounded = round_to_int8(x, 48)
    for begin, end in ((0, 32), (32, 48), (48, 80), (80, 96), (96, 100)):
        step = x[..., begin:end].abs().amax(-1, keepdim=True) / 127
        assert ((rounded - x)[..., begin:end].abs() <= 0.501 * step).all()


def test_rounding_twice_changes_nothing_and_signs_are_alike() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    once = round_to_int8(x, 64)
    torch.testing.assert_close(round_to_int8(once, 64), once)
    assert torch.equal(round_to_int8(-x, 64), -once)


def test_only_the_run_of_what_is_not_finite_becomes_nan() -> None:
    x = torch.ones(1, 96)
    x[0, 40] = float("inf")
    rounded = round_to_int8(x, 96)
    assert rounded[0, 32:64].isnan().all()
    torch.testing.assert_close(rounded[0, :32], x[0, :32])


def test_weights_whose_codes_are_no_integers_round_no_input() -> None:
    weight = torch.randn(32, 64)
    assert not pack_weight(weight).rounding_input().rounds_input
    assert not pack_weight(quantised(weight.bfloat16(), FP8.name, 32)).rounding_input().rounds_input
    assert pack_weight(quantize_weight(weight, INT8.name)).rounding_input().rounds_input
