"""The joint low-rank factorisation of what is left of the keys, and of the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RELATIVE_RANK = 1e-12


@dataclass(frozen=True)
class Factors:
    """y ~ decoder (encoder y), y the keys without RoPE and the values.

    Attributes:
        encoder: [r, n] float64.
        decoder: [n, r] float64.
        kept: share of the weighted energy that is kept.
    """

    encoder: Tensor
    decoder: Tensor
    kept: float


def factorize(moment: Tensor, weight: Tensor, rank: int, *, mean: Tensor | None = None, centred: int = 0) -> Factors:
    """The factors of rank r that minimise E |weight^(1/2) (y - decoder encoder y)|^2: weighted principal components.

    The encoder's rows are the top eigenvectors of weight^(1/2) E[y y^T] weight^(1/2), carried back; the decoder is the
    regression of y on what the encoder gives, so weight is never inverted.

    A constant error of the keys costs nothing, for it adds the same to all scores of a query. Whether it pays to spend
    one latent on the constants of keys and values, or to leave those of the keys out, depends on the layer: both are
    tried beside the plain components, and the encoder with the least error is taken.

    Args:
        moment: E[y y^T] [n, n] float64.
        weight: [n, n] float64, positive semidefinite, nothing between keys and values: what an error of y costs. The
            identity gives plain PCA.
        rank: r, at most n.
        mean: E[y] [n]; None: constants are nothing special.
        centred: how many numbers of y are keys, which come first.
    """
    root = _square_root(weight)
    encoders = [_principal(moment, root, rank)]
    around = moment
    if mean is not None:
        around = moment - torch.outer(mean, mean)
        constant = torch.linalg.pinv(around, hermitian=True, rtol=_RELATIVE_RANK) @ mean
        encoders.append(torch.cat([_principal(around, root, rank - 1), constant[None]]))
        keys = torch.arange(len(moment)) < centred
        encoders.append(_principal(torch.where(keys[:, None] | keys, around, moment), root, rank))
    return min((_decoded(encoder, moment, around, weight, centred) for encoder in encoders), key=lambda f: -f.kept)


def _principal(moment: Tensor, root: Tensor, rank: int) -> Tensor:
    """[r, n] the top eigenvectors of root moment root, carried back."""
    _, vectors = torch.linalg.eigh(root @ moment @ root)
    return vectors.flip(1)[:, :rank].mT @ root


def _decoded(encoder: Tensor, moment: Tensor, around: Tensor, weight: Tensor, centred: int) -> Factors:
    """The best decoder of an encoder; keys are regressed around their mean, values as they are."""
    keys = slice(None, centred), around
    values = slice(centred, None), moment
    rows: list[Tensor] = []
    lost = total = 0.0
    for part, of in (keys, values):
        covariance = of[part] @ encoder.mT
        own = covariance @ torch.linalg.pinv(encoder @ of @ encoder.mT, hermitian=True, rtol=_RELATIVE_RANK)
        energy = float((weight[part, part] * of[part, part]).sum())
        lost += energy - float((weight[part, part] * (own @ covariance.mT)).sum())
        total += energy
        rows.append(own)
    return Factors(encoder, torch.cat(rows), 1 - max(lost, 0.0) / total if total else 1.0)


def _square_root(weight: Tensor) -> Tensor:
    energies, vectors = torch.linalg.eigh(weight)
    return vectors * energies.clamp(min=0).sqrt() @ vectors.mT
