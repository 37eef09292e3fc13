import math

import torch

from latentkv.convert.allocation import (
    choose_counts,
    choose_grid,
    choose_pairs,
    gains,
    grid_steps,
    largest_grid,
    loss_without_rope,
    mean_turn,
)
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


PLAIN = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)


def test_every_step_that_leaves_enough_frequencies_of_a_plain_rope_is_a_grid() -> None:
    assert grid_steps(PLAIN, 1) == [1]
    assert grid_steps(PLAIN, 2) == [1, 2, 3, 4, 5, 6, 7]
    assert grid_steps(PLAIN, 4) == [1, 2]
    assert grid_steps(PLAIN, 8) == [1]
    assert grid_steps(PLAIN, 9) == []
    assert largest_grid(PLAIN) == 8


def test_of_a_scaled_rope_only_frequencies_that_the_scaling_leaves_alone_are_a_grid() -> None:
    scaled = torch.where(torch.arange(8) < 3, PLAIN, PLAIN / 4)
    assert (grid_steps(scaled, 2), grid_steps(scaled, 3), grid_steps(scaled, 4)) == ([1, 2, 3, 4, 5, 6, 7], [1], [])
    assert largest_grid(scaled) == 3
    assert largest_grid(PLAIN / 4) == 0


def test_the_grid_that_saves_most_is_taken_with_one_pair_of_each_frequency() -> None:
    saved = torch.tensor([[9.0, 8.0], [1, 1], [5, 4], [6, 5], [5, 5], [0, 0], [1, 1], [0, 0]], dtype=torch.float64)
    assert choose_grid(saved, PLAIN, 3).tolist() == [1, 0, 1, 0, 1, 0, 0, 0]  # 19, before 16 of step 3
    assert choose_grid(saved, PLAIN, 2).tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert choose_grid(saved, PLAIN, 1).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert choose_grid(saved, PLAIN, 8).tolist() == [1] * 8
