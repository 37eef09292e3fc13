"""Turning keys and queries by the same basis changes no score: exactly, with RoPE, for the bases that are exact."""

import pytest
import torch

from latentkv.convert.rotation import folded_rotation, unitary_rotation

HEADS, WIDTH = 4, 16


def moment(seed: int = 0) -> torch.Tensor:
    x = torch.randn(400, HEADS * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(HEADS * WIDTH, HEADS * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.mT @ x / len(x)


def rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[heads, d] with pairs (l, l + d/2), each turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def paired_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[2 pairs], pairs beside each other, each turned by its angle."""
    re, im = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([re * cos - im * sin, im * cos + re * sin], dim=-1).flatten(-2)


@pytest.mark.parametrize("make", [unitary_rotation, lambda m, g: folded_rotation(m, g, 1)])
def test_scores_of_every_head_at_every_distance_are_the_same_to_1e_10(make) -> None:
    rotation = make(moment(), HEADS)
    generator = torch.Generator().manual_seed(2)
    frequencies = torch.rand(WIDTH // 2, dtype=torch.float64, generator=generator)
    keys = torch.randn(HEADS, WIDTH, dtype=torch.float64, generator=generator)
    queries = torch.randn(HEADS, WIDTH, dtype=torch.float64, generator=generator)
    turned_keys = rotation.matrix @ keys.flatten()
    for distance in (0, 1, 17, 4000):
        expected = (rope(queries, frequencies * (distance + 5)) * rope(keys, frequencies * 5)).sum(-1)
        angles = frequencies[rotation.frequency]
        for head in range(HEADS):
            lifted = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
            lifted[head] = queries[head]
            query = paired_rope(rotation.matrix @ lifted.flatten(), angles * (distance + 5))
            score = query @ paired_rope(turned_keys, angles * 5)
            assert abs(float(score - expected[head])) < 1e-10


@pytest.mark.parametrize("fold", [1, 2, 8])
def test_a_fold_gives_each_frequency_to_as_many_pairs_as_there_are_heads(fold: int) -> None:
    rotation = folded_rotation(moment(), HEADS, fold)
    assert torch.bincount(rotation.frequency).tolist() == [HEADS] * (WIDTH // 2)


@pytest.mark.parametrize("fold", [None, 1, 2, 8])
def test_a_basis_is_orthogonal_and_says_each_pairs_energy(fold: int | None) -> None:
    key_moment = moment()
    rotation = unitary_rotation(key_moment, HEADS) if fold is None else folded_rotation(key_moment, HEADS, fold)
    eye = torch.eye(HEADS * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix @ rotation.matrix.mT, eye, rtol=0, atol=1e-12)
    energy = ((rotation.matrix @ key_moment) * rotation.matrix).sum(1).unflatten(0, (-1, 2)).sum(1)
    torch.testing.assert_close(energy, rotation.energy, rtol=1e-9, atol=1e-9)


def test_the_unitary_basis_gathers_at_least_as_much_energy_as_the_real_one() -> None:
    unitary, real = unitary_rotation(moment(), HEADS), folded_rotation(moment(), HEADS, 1)
    for basis in (unitary, real):
        assert (basis.energy.view(-1, HEADS).diff(dim=1) <= 1e-9).all()  # most first
    first = [basis.energy.view(-1, HEADS)[:, 0] for basis in (unitary, real)]
    assert (first[0] >= first[1] - 1e-9).all() and (first[0] > first[1] + 1e-3).any()
