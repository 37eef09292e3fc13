"""Each filter against its definition written out, and against transformers' own processors."""

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from latentkv.engine import SamplingParams, sample
from latentkv.engine.sampler import (
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    scale_temperature,
    token_logprobs,
)

SIZE = 50


def some_logits(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


def theirs(processor, logits: Tensor, seen: tuple[int, ...] = (0,)) -> Tensor:
    return processor(torch.tensor([seen]), logits[None].clone())[0]


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


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers_whatever_the_repeats(penalty: float):
    logits, seen = some_logits(3), (4, 4, 9, 0, 4)
    result = penalize_repetition(logits, seen, penalty)
    assert torch.equal(result, theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, seen))
    for token in range(SIZE):
        factor = (1 / penalty if logits[token] > 0 else penalty) if token in seen else 1
        assert float(result[token]) == pytest.approx(float(logits[token]) * factor)


def test_the_whole_chain_keeps_the_distribution_of_transformers():
    logits, seen = some_logits(5), (1, 2, 3)
    ours = scale_temperature(penalize_repetition(logits, seen, 1.2), 0.7)
    ours = keep_min_p(keep_top_p(keep_top_k(ours, 30), 0.95), 0.02)
    expected = logits.double()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.02),
    ):
        expected = theirs(processor, expected, seen)
    assert torch.allclose(ours.softmax(-1), expected.softmax(-1), atol=1e-7)


def test_samples_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = [sample(logits, SamplingParams(), seed=7, tokens=[0] * n) for n in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert torch.allclose(share, logits.softmax(-1), atol=0.03)


def test_filters_apply_before_the_choice():
    logits = some_logits(2)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0)):
        draws = {sample(logits, params, seed=seed, tokens=[]) for seed in range(30)}
        assert draws == {int(logits.argmax())}


def test_greedy_and_a_temperature_near_zero_take_the_likeliest():
    logits = some_logits(8)
    for temperature in (0, 1e-300, 1e-30, 1e-6):
        params = SamplingParams(temperature=temperature)
        assert sample(logits, params, seed=1, tokens=[]) == int(logits.argmax())
    penalised = SamplingParams(temperature=0, repetition_penalty=100)
    assert sample(torch.tensor([1.0, 2.0]), penalised, seed=1, tokens=[1]) == 0


def test_noise_depends_on_seed_and_position_alone():
    assert torch.equal(gumbel_noise(5, 9, 100), gumbel_noise(5, 9, 100))
    assert torch.equal(gumbel_noise(5, 9, 100)[:40], gumbel_noise(5, 9, 40))
    for other in (gumbel_noise(6, 9, 100), gumbel_noise(5, 10, 100), gumbel_noise(9, 5, 100)):
        assert not torch.equal(gumbel_noise(5, 9, 100), other)
    assert gumbel_noise(2**63 - 1, 0, 100_000).isfinite().all()


def test_logprobs_are_those_of_the_raw_logits_best_first():
    logits = some_logits(4)
    reported = token_logprobs(logits[None], [11], 3)[0]
    probs = logits.double().softmax(-1)
    assert reported.token_id == 11
    assert reported.logprob == pytest.approx(math.log(probs[11]), abs=1e-5)
    assert list(reported.top) == probs.topk(3).indices.tolist()
    everything = token_logprobs(logits[None], [0], SIZE)[0].top
    assert sum(math.exp(value) for value in everything.values()) == pytest.approx(1, abs=1e-5)
    assert token_logprobs(logits[None], [0], 0)[0].top == {}
