"""The choice of tokens: each filter against its definition and transformers', the kernel against all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from latentkv.errors import OpError
from latentkv.kernels import available_backends, use_backend
from latentkv.ops import ChoiceRule, choose_tokens
from latentkv.ops.choice import gumbel_noise, keep_min_p, keep_top_k, keep_top_p

SIZE = 50
every_backend = pytest.mark.parametrize("backend", ["torch", available_backends()[-1]])


def some_logits(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


def theirs(processor, logits: Tensor) -> Tensor:
    return processor(torch.tensor([(0,)]), logits[None].clone())[0]


@pytest.mark.parametrize("seed", range(20))
def test_top_k_keeps_the_k_largest(seed: int):
    logits = some_logits(seed)
    for k in (1, 2, 7, 49):
        best = sorted(range(SIZE), key=lambda i: -float(logits[i]))[:k]
        assert kept(keep_top_k(logits, k)) == set(best)
        assert torch.equal(keep_top_k(logits, k), theirs(TopKLogitsWarper(k), logits))
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, SIZE + 5) is logits


@pytest.mark.parametrize("seed", range(20))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int):
    logits = some_logits(seed).double()
    probs = logits.softmax(-1).tolist()
    for p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        nucleus, mass = set(), 0.0
        for token in sorted(range(SIZE), key=lambda i: -probs[i]):
            if mass >= p:
                break
            nucleus.add(token)
            mass += probs[token]
        result = keep_top_p(logits, p)
        assert kept(result) == nucleus
        assert torch.equal(result, theirs(TopPLogitsWarper(p), logits))
    assert keep_top_p(logits, 1.0) is logits


def test_top_p_works_on_equal_and_on_already_filtered_logits():
    assert len(kept(keep_top_p(torch.zeros(8).double(), 0.5))) == 4
    filtered = keep_top_k(some_logits(1).double(), 3)
    assert kept(keep_top_p(filtered, 0.9999999)) == kept(filtered)


@pytest.mark.parametrize("seed", range(20))
def test_min_p_keeps_tokens_relative_to_the_likeliest(seed: int):
    logits = some_logits(seed).double()
    probs = logits.softmax(-1)
    for p in (0.01, 0.2, 0.9, 1.0):
        assert kept(keep_min_p(logits, p)) == {i for i in range(SIZE) if probs[i] >= p * probs.max()}
        assert torch.equal(keep_min_p(logits, p), theirs(MinPLogitsWarper(p), logits))
    assert keep_min_p(logits, 0.0) is logits


def test_noise_depends_on_seed_and_position_alone():
    assert torch.equal(gumbel_noise(5, 9, 100), gumbel_noise(5, 9, 100))
    assert torch.equal(gumbel_noise(5, 9, 100)[:40], gumbel_noise(5, 9, 40))
    for other in (gumbel_noise(6, 9, 100), gumbel_noise(5, 10, 100), gumbel_noise(9, 5, 100)):
        assert not torch.equal(gumbel_noise(5, 9, 100), other)
    assert gumbel_noise(2**63 - 1, 0, 100_000).isfinite().all()


@every_backend
def test_samples_follow_the_distribution(backend):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    with use_backend(backend):
        draws = choose_tokens(logits.expand(4000, 4).contiguous(), [ChoiceRule(7, n) for n in range(4000)])
    share = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert torch.allclose(share, logits.softmax(-1), atol=0.03)


@every_backend
@pytest.mark.parametrize("rule", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_filters_apply_before_the_choice(backend, rule):
    logits = some_logits(2)
    with use_backend(backend):
        draws = choose_tokens(logits.expand(30, SIZE).contiguous(), [ChoiceRule(seed, 0, **rule) for seed in range(30)])
    assert set(draws) == {int(logits.argmax())}


@every_backend
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 1e-6])
def test_greedy_and_a_temperature_near_zero_take_the_likeliest_and_of_equals_the_first(backend, temperature):
    logits = some_logits(8)
    with use_backend(backend):
        assert choose_tokens(logits[None], [ChoiceRule(1, 0, temperature)]) == [int(logits.argmax())]
        if temperature == 0:
            assert choose_tokens(torch.tensor([[1.0, 2, 0, 2, 2] + [0] * 40]), [ChoiceRule(1, 0, 0)]) == [1]


# Vocabularies that vectors do and do not divide; temperatures that flatten and sharpen.
RULES = st.builds(
    ChoiceRule,
    seed=st.sampled_from([0, 1, 12345, 2**63 + 100]),
    position=st.integers(0, 100_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-6, 1.0]),
)


@pytest.mark.skipif(available_backends()[-1] == "torch", reason="the native kernels are not built")
@given(
    rules=st.lists(RULES, min_size=1, max_size=6),
    size=st.sampled_from([1, 3, 17, 50, 1000, 32_769]),
    spread=st.sampled_from([0.0, 1e-3, 3.0, 30.0, 1e6]),
    forbidden=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_the_kernel_chooses_what_the_definition_does(rules, size, spread, forbidden):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(len(rules), size, generator=generator) * spread
    logits[torch.rand(len(rules), size, generator=generator) < forbidden] = -torch.inf
    logits[:, size // 2] = 0.5  # one is always allowed
    with use_backend("torch"):
        expected = choose_tokens(logits, rules)
    with use_backend(available_backends()[-1]):
        assert choose_tokens(logits, rules) == expected


@pytest.mark.skipif(available_backends()[-1] == "torch", reason="the native kernels are not built")
def test_the_kernels_noise_is_the_definitions_for_every_token():
    """With two candidates at a time, every one of them is chosen exactly where its noise is the greater."""
    size = 4099
    noise = gumbel_noise(9, 77, size)
    for first in range(0, size - 1, 13):
        logits = torch.full((1, size), -torch.inf)
        logits[0, first : first + 2] = 0.0
        for rule in (ChoiceRule(9, 77), ChoiceRule(9, 77, top_k=2), ChoiceRule(9, 77, top_p=0.99)):
            assert choose_tokens(logits, [rule]) == [first + int(noise[first : first + 2].argmax())]


@every_backend
def test_a_row_does_not_depend_on_the_others(backend):
    logits = torch.stack([some_logits(seed, 300) for seed in range(9)])
    rules = [ChoiceRule(seed, 5, top_k=(0, 7)[seed % 2], top_p=(1.0, 1.0, 0.8)[seed % 3]) for seed in range(9)]
    with use_backend(backend):
        together = choose_tokens(logits, rules)
        assert together == [choose_tokens(logits[i : i + 1], rules[i : i + 1])[0] for i in range(9)]


@pytest.mark.parametrize(
    ("logits", "rules"),
    [
        (torch.zeros(3), [ChoiceRule(0, 0)] * 3),
        (torch.zeros(2, 3), [ChoiceRule(0, 0)]),
        (torch.zeros(1, 0), [ChoiceRule(0, 0)]),
        (torch.zeros(1, 3).double(), [ChoiceRule(0, 0)]),
    ],
)
def test_what_are_no_logits_of_rules_is_refused(logits, rules):
    with pytest.raises(OpError, match="choose_tokens takes float32 logits"):
        choose_tokens(logits, rules)


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0}])
def test_rows_in_which_nothing_is_finite_get_some_token(backend, value, rule):
    with use_backend(backend):
        tokens = choose_tokens(torch.full((2, 7), value), [ChoiceRule(3, 4, **rule)] * 2)
        assert all(0 <= token < 7 for token in tokens)
        mixed = torch.full((1, 7), value)
        mixed[0, 4] = 1.0
        assert 0 <= choose_tokens(mixed, [ChoiceRule(3, 4, **rule)])[0] < 7


def test_no_rows_have_no_tokens():
    assert choose_tokens(torch.zeros(0, 5), []) == []
