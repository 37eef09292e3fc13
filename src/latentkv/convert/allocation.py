"""Which pairs keep their RoPE: what a pair loses by giving it up depends on its energy and on how far it turns."""

from __future__ import annotations

import torch
from torch import Tensor

from latentkv.convert.rotation import Rotation


def mean_turn(frequencies: Tensor, distance_weights: Tensor) -> Tensor:
    """rho_l = E[e^(i theta_l distance)] [d/2] complex128: the constant nearest to RoPE's factor where it is given up.

    |rho| is 1 for a frequency that hardly turns within the distances that attention bridges, and near 0 for a fast one.

    Args:
        frequencies: theta_l [d/2] float64, radians a token.
        distance_weights: [T] float64, how much attention goes to keys so many tokens back; sums to 1.
    """
    distances = torch.arange(len(distance_weights), dtype=torch.float64)
    return torch.exp(1j * frequencies[:, None] * distances) @ distance_weights.to(torch.complex128)


def loss_without_rope(rotation: Rotation, query_energy: Tensor, turn: Tensor) -> Tensor:
    """[pairs] mean square error of the scores if a pair's RoPE is replaced by its mean turn.

    Var[q conj(k) e^(i theta distance)] = E|q|^2 E|k|^2 (1 - |rho|^2), keys and queries taken as independent.

    Args:
        rotation: the pairs.
        query_energy: [pairs] mean square of the queries' pairs, summed over heads.
        turn: `mean_turn` [d/2].
    """
    return rotation.energy * query_energy * (1 - turn.abs().square())[rotation.frequency]


def gains(rotation: Rotation, loss: Tensor, half: int) -> Tensor:
    """[d / 2, pairs of a frequency] what keeping RoPE saves, the most first: the same pairs by frequency."""
    per_frequency = torch.stack([loss[rotation.frequency == index] for index in range(half)])
    return per_frequency.sort(dim=1, descending=True).values


def choose_counts(gains: Tensor, count: int) -> Tensor:
    """How many pairs of each frequency keep their RoPE, [d / 2] int64, in all layers alike: a model has one RoPE.

    Args:
        gains: see `gains`, summed over layers.
        count: R / 2.
    """
    chosen = torch.topk(gains.flatten(), count).indices // gains.shape[1]
    return torch.bincount(chosen, minlength=len(gains))


def choose_pairs(rotation: Rotation, loss: Tensor, counts: Tensor) -> Tensor:
    """Of each frequency the pairs that lose most without RoPE: indices, frequency by frequency."""
    chosen = [
        (index := (rotation.frequency == frequency).nonzero()[:, 0])[loss[index].topk(int(count)).indices]
        for frequency, count in enumerate(counts)
    ]
    return torch.cat(chosen)


def grid_steps(frequencies: Tensor, count: int) -> list[int]:
    """The steps k of which the frequencies 0, k, 2k, .. form a plain RoPE of `count` pairs: b^(-i/count) for some b.

    Of a plain RoPE that is every step which leaves enough frequencies. Of a scaled one it is a step that meets none but
    frequencies which the scaling leaves alone; or any, where two pairs are asked for. A single pair counts as step 1.

    Args:
        frequencies: theta_l [d / 2] float64, radians a token.
        count: R / 2, of pairs that keep their RoPE.
    """
    if count > len(frequencies):
        return []
    steps = range(1, (len(frequencies) - 1) // (count - 1) + 1) if count > 1 else [1]
    return [step for step in steps if _is_plain(frequencies[::step][:count])]


def choose_grid(gains: Tensor, frequencies: Tensor, count: int) -> Tensor:
    """`choose_counts` of an engine that reads plain RoPEs only: one pair of each frequency 0, k, 2k, .., k the best.

    Args:
        gains: see `gains`, summed over layers.
        frequencies: theta_l [d / 2] float64.
        count: R / 2; `grid_steps` must not be empty.
    """
    steps = grid_steps(frequencies, count)
    best = max(steps, key=lambda step: float(gains[::step, 0][:count].sum()))
    counts = torch.zeros(len(gains), dtype=torch.int64)
    counts[::best][:count] = 1
    return counts


def largest_grid(frequencies: Tensor) -> int:
    """The most pairs for which `grid_steps` finds a step; 0 if there are none."""
    return max((n for n in range(1, len(frequencies) + 1) if grid_steps(frequencies, n)), default=0)


def _is_plain(frequencies: Tensor) -> bool:
    ratio = frequencies[1] if len(frequencies) > 1 else frequencies.new_ones(())
    series = ratio ** torch.arange(len(frequencies), dtype=torch.float64)
    return bool(((frequencies / series - 1).abs() < 1e-9).all())
