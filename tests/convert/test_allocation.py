import math

import torch

from latentkv.convert.allocation import choose_counts, choose_pairs, gains, loss_without_rope, mean_turn
from latentkv.convert.rotation import Rotation

FREQUENCIES = torch.tensor([1.0, 0.1, 0.0001], dtype=torch.float64)


def rotation(energy: list[float], frequency: list[int]) -> Rotation:
    return Rotation(torch.zeros(0), torch.tensor(frequency), torch.tensor(energy, dtype=torch.float64))


def test_the_mean_turn_is_the_mean_of_ropes_factor_over_distances() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = mean_turn(FREQUENCIES, weights)
    for theta, rho in zip(FREQUENCIES.tolist(), found, strict=True):
        expected = sum(w * complex(math.cos(theta * d), math.sin(theta * d)) for d, w in enumerate(weights.tolist()))
        assert abs(complex(rho) - expected) < 1e-12


def test_a_pair_that_never_turns_loses_nothing_and_a_fast_one_what_its_scores_vary_by() -> None:
    weights = torch.ones(100, dtype=torch.float64) / 100
    pairs = rotation([2.0, 2.0, 2.0], [0, 1, 2])
    loss = loss_without_rope(pairs, torch.tensor([3.0, 3.0, 3.0]), mean_turn(FREQUENCIES, weights))
    assert loss[2] < 1e-3 * loss[0] and loss[1] < loss[0] <= 6
    # By its definition: the variance of q conj(k) e^(i theta distance) over distances, with |q|^2 = 3 and |k|^2 = 2.
    turned = torch.exp(1j * FREQUENCIES[1] * torch.arange(100, dtype=torch.float64))
    assert abs(float(loss[1]) - 6 * float((turned - turned.mean()).abs().square().mean())) < 1e-9


def test_pairs_are_chosen_for_all_layers_together_by_what_they_save_in_sum() -> None:
    one = rotation([1.0] * 6, [0, 0, 1, 1, 2, 2])
    first, second = torch.tensor([5.0, 1, 4, 3, 0, 0]), torch.tensor([0.0, 4, 3, 3.5, 0, 0])
    total = gains(one, first, 3) + gains(one, second, 3)
    assert total.tolist() == [[9, 1], [7.5, 6], [0, 0]]
    counts = choose_counts(total, 3)
    assert counts.tolist() == [1, 2, 0]
    assert choose_pairs(one, first, counts).tolist() == [0, 2, 3]
    assert choose_pairs(one, second, counts).tolist() == [1, 3, 2]
