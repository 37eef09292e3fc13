"""The arms: their sizes, their caches and how they are matched."""

from __future__ import annotations

import pytest

from latentkv.compare.arms import default_arms, matched_width, parse_arm
from latentkv.compare.sizes import Sizes
from latentkv.errors import RequestError
from latentkv.models.decoder import Decoder
from latentkv.plan import count_parameters
from latentkv.state import bytes_per_token

SIZES = [Sizes(), Sizes(256, 6, 16, 4096), Sizes(96, 3, 8, 1024)]


def test_default_arms_have_the_caches_that_are_to_be_compared() -> None:
    names = default_arms(Sizes())
    assert names == ("mha", "gqa-2", "mqa", "mla-56", "mla-24", "mla-8")
    cached = {name: parse_arm(name, Sizes()).cached_numbers(Sizes()) for name in names}
    assert cached["mla-56"] == cached["gqa-2"] == cached["mha"] // 4
    assert cached["mla-24"] == cached["mqa"] == cached["mha"] // 8
    assert cached["mla-8"] == cached["mha"] // 16


def test_arms_that_the_sizes_do_not_allow_are_left_out() -> None:
    assert default_arms(Sizes(32, 2, 4)) == ("mha", "mqa", "mla-12")
    assert default_arms(Sizes(32, 2, 1)) == ("mha", "mla-48")


@pytest.mark.parametrize("sizes", SIZES)
def test_matched_arms_have_the_parameters_of_mha_within_one_percent(sizes: Sizes) -> None:
    wanted = count_parameters(parse_arm("mha", sizes).config(sizes, sizes.mha_width))
    assert matched_width(parse_arm("mha", sizes), sizes) == sizes.mha_width
    for name in default_arms(sizes):
        arm = parse_arm(name, sizes)
        width = matched_width(arm, sizes)
        assert width % 8 == 0
        decoder = Decoder(arm.config(sizes, width))
        assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("sizes", SIZES)
def test_cached_numbers_are_those_that_the_cache_stores(sizes: Sizes) -> None:
    for name in default_arms(sizes):
        arm = parse_arm(name, sizes)
        specs = arm.config(sizes, 64).specs("bf16")
        padding = 16 * sizes.num_layers  # a token's stride is a multiple of 16 bytes
        assert 0 <= bytes_per_token(specs) - 2 * arm.cached_numbers(sizes) < padding


@pytest.mark.parametrize("name", ["gqa-1", "gqa-3", "gqa-8", "gqa", "mla-", "mla-0", "mla-x", "linear"])
def test_an_arm_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        parse_arm(name, Sizes())


def test_an_attention_larger_than_all_of_mha_cannot_be_matched() -> None:
    with pytest.raises(RequestError, match="mla-4096 has more parameters"):
        matched_width(parse_arm("mla-4096", Sizes()), Sizes())
