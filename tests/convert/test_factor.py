import torch

from latentkv.convert.factor import factorize


def sample(n: int = 12, tokens: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, n, dtype=torch.float64, generator=generator) @ mix + 3


def weighted_error(y: torch.Tensor, weight: torch.Tensor, factors) -> float:
    rest = y - y @ factors.encoder.mT @ factors.decoder.mT
    return float(((rest @ weight) * rest).sum(1).mean())


def some_weight(n: int = 12) -> torch.Tensor:
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return root @ root.mT


def test_the_full_rank_gives_everything_back() -> None:
    y = sample()
    factors = factorize(y.mT @ y / len(y), some_weight(), 12)
    torch.testing.assert_close(y @ factors.encoder.mT @ factors.decoder.mT, y, rtol=0, atol=1e-8)
    assert factors.kept > 1 - 1e-12


def test_a_low_rank_has_the_least_weighted_error_that_eckart_and_young_allow() -> None:
    y, weight = sample(), some_weight()
    factors = factorize(y.mT @ y / len(y), weight, 5)
    values, vectors = torch.linalg.eigh(weight)
    root = vectors * values.sqrt() @ vectors.mT
    least = torch.linalg.svdvals(y @ root)[5:].square().sum() / len(y)
    assert abs(weighted_error(y, weight, factors) / float(least) - 1) < 1e-9


def test_a_weight_of_low_rank_spends_nothing_on_what_costs_nothing() -> None:
    y = sample()
    weight = torch.zeros(12, 12, dtype=torch.float64)
    weight[:3, :3] = torch.eye(3, dtype=torch.float64)
    factors = factorize(y.mT @ y / len(y), weight, 3)
    assert weighted_error(y, weight, factors) < 1e-12


def test_a_constant_of_the_keys_costs_nothing_and_those_of_the_values_are_kept() -> None:
    y, keys = sample(), 6
    y[:, :keys] += 100  # a constant that would take the whole rank
    moment, mean = y.mT @ y / len(y), y.mean(0)
    eye = torch.eye(12, dtype=torch.float64)
    factors = factorize(moment, eye, 8, mean=mean, centred=keys)
    rest = y - y @ factors.encoder.mT @ factors.decoder.mT
    varying = rest[:, :keys] - rest[:, :keys].mean(0)
    plain = factorize(moment, eye, 8)
    plain_rest = y - y @ plain.encoder.mT @ plain.decoder.mT
    ours = varying.square().sum() + rest[:, keys:].square().sum()
    theirs = (plain_rest[:, :keys] - plain_rest[:, :keys].mean(0)).square().sum() + plain_rest[:, keys:].square().sum()
    assert ours < theirs
