"""What can be turned among key heads without changing a score: per frequency, or within a fold of neighbouring ones.

RoPE multiplies the pair of dimensions (l, l + d/2) of every key and query head by e^(i theta_l t): one number for all
heads, so a unitary map that mixes the heads' l-th pairs commutes with it (RoRoPE; the unitary form keeps more than the
real one). Applied to keys and queries alike it leaves all scores as they are, and gathers the energy in few pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """An orthogonal basis of all key dimensions, pair by pair.

    Attributes:
        matrix: [G d, G d] float64; rows 2p and 2p + 1 are the real and the imaginary part of pair p.
        frequency: [G d / 2] int64, which of the head's d/2 frequencies turns pair p (approximately, if folded).
        energy: [G d / 2] float64, mean square of pair p of the keys.
    """

    matrix: Tensor
    frequency: Tensor
    energy: Tensor


def unitary_rotation(key_moment: Tensor, num_heads: int) -> Rotation:
    """The exact rotation: for each frequency the eigenvectors of E[z z^H], z [G] the heads' complex pairs.

    Args:
        key_moment: [G d, G d] float64, E[k k^T] of the keys before RoPE, head by head.
        num_heads: G.

    Returns:
        Pairs in the order (frequency, falling energy).
    """
    half = key_moment.shape[0] // num_heads // 2
    moment = key_moment.unflatten(0, (num_heads, 2, half)).unflatten(-1, (num_heads, 2, half))
    # [half, G, G] of x x^T, y y^T and y x^T, where z = x + i y.
    xx, yy, yx = (torch.einsum("glhl->lgh", moment[:, a, :, :, b]) for a, b in ((0, 0), (1, 1), (1, 0)))
    hermitian = torch.complex(xx + yy, yx - yx.mT)
    energy, vectors = torch.linalg.eigh(hermitian)
    energy, vectors = energy.flip(-1), vectors.flip(-1)
    matrix = torch.zeros(half, num_heads, 2, num_heads, 2, half, dtype=torch.float64)
    for frequency in range(half):
        adjoint = vectors[frequency].mH  # [pair, head]: z' = U^H z
        block = matrix[frequency, :, :, :, :, frequency]  # [pair, re/im, head, x/y]
        block[:, 0, :, 0], block[:, 0, :, 1] = adjoint.real, -adjoint.imag
        block[:, 1, :, 0], block[:, 1, :, 1] = adjoint.imag, adjoint.real
    frequencies = torch.arange(half).repeat_interleave(num_heads)
    return Rotation(matrix.flatten(3).flatten(0, 2), frequencies, energy.clamp(min=0).flatten())


def folded_rotation(key_moment: Tensor, num_heads: int, fold: int) -> Rotation:
    """TransMLA's rotation (arXiv 2502.07864): one real basis for the pairs of `fold` neighbouring frequencies.

    With fold 1 it is exact; beyond, components of different frequencies mix, and each is given one of them.

    Args:
        key_moment: [G d, G d] float64, E[k k^T] of the keys before RoPE, head by head.
        num_heads: G.
        fold: neighbouring frequencies that share a basis; divides d/2.

    Returns:
        Pairs in the order (fold, falling energy); the first `fold` of each get its frequencies in order, and so on.
    """
    half = key_moment.shape[0] // num_heads // 2
    groups, width = half // fold, num_heads * fold
    shape = (num_heads, 2, groups, fold)
    moment = key_moment.unflatten(0, shape).unflatten(-1, shape)
    xx, yy = (torch.einsum("gufhuk->ugfhk", moment[:, a, :, :, :, a]) for a in (0, 1))
    energy, vectors = torch.linalg.eigh((xx + yy).reshape(groups, width, width))
    energy, vectors = energy.flip(-1), vectors.flip(-1)
    basis = vectors.mT.unflatten(-1, (num_heads, fold))  # [group, component, head, frequency]
    matrix = torch.zeros(groups, width, 2, *shape, dtype=torch.float64)
    for group in range(groups):
        for part in (0, 1):
            matrix[group, :, part, :, part, group] = basis[group]
    frequencies = torch.arange(half).unflatten(0, (groups, 1, fold)).expand(-1, num_heads, -1)
    return Rotation(matrix.flatten(3).flatten(0, 2), frequencies.flatten(), energy.clamp(min=0).flatten())
