"""Least squares after factoring: what a layer adds to the residual stream is fitted to the source's own stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentkv.convert.options import Refit
from latentkv.convert.states import HiddenStates
from latentkv.models.decoder import DecoderLayer
from latentkv.models.layers import MLP
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.models.rope import Rotary

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Weights of the ridge that are tried, as shares of the mean square of what the projection reads."""


@dataclass(frozen=True)
class Stream:
    """The source's residual stream around one of its layers, on the calibration text.

    Attributes:
        between: after attention.
        after: after the feed-forward block.
    """

    between: HiddenStates
    after: HiddenStates


@torch.no_grad()
def refit_layer(
    layer: DecoderLayer, angles: Rotary, states: HiddenStates, stream: Stream, refit: Refit, first_held_out: int
) -> dict[str, Tensor]:
    """Fit o_proj, then down_proj, so that the layer ends where the source's own stream is.

    Both are linear in what they read, so the best is had by regression, without gradients. It makes up for what this
    layer loses and for what those before it have lost.

    Args:
        layer: a converted one, float32; it is left with the weights that are returned.
        angles: of its positions.
        states: what it reads.
        stream: where the source is.
        refit: which of the two; experts are left as they are.
        first_held_out: the first sequence that is not fitted to; 0: there is none to fit to.

    Returns:
        {name in the layer: weight} of those that come nearer on the text that is held out.
    """
    problems: dict[str, _Problem] = {}
    if refit != "none" and isinstance(layer.self_attn, MultiHeadLatentAttention):
        output = layer.self_attn.o_proj
        problems["self_attn.o_proj.weight"] = _Problem(output, layer.between, angles, states, stream.between)
    if refit == "all" and isinstance(layer.mlp, MLP):
        problems["mlp.down_proj.weight"] = _Problem(layer.mlp.down_proj, layer, angles, states, stream.after)
    if not first_held_out:  # a single sequence
        return {}
    solved = {name: problem.solve(first_held_out) for name, problem in problems.items()}
    return {name: weight for name, weight in solved.items() if weight is not None}


@dataclass(frozen=True)
class _Problem:
    """A projection whose output is added to the residual stream, and where that should be then.

    Attributes:
        projection: the projection.
        run: from what the layer reads, and angles, to the stream after it.
        angles: of the positions.
        states: what the layer reads.
        wanted: where the stream should be.
    """

    projection: nn.Linear
    run: Callable[[Tensor, Rotary], Tensor]
    angles: Rotary
    states: HiddenStates
    wanted: HiddenStates

    def solve(self, first_held_out: int) -> Tensor | None:
        """The weight of the best ridge regression around the one that is there; None where that one is better."""
        weight = self.projection.weight
        learned = moments(self._samples(0, first_held_out))
        best, least = None, self._error(first_held_out)
        for ridge in RIDGES:
            candidate = weight + regression(*learned, ridge).to(weight.dtype)
            self.projection.weight = nn.Parameter(candidate, requires_grad=False)
            error = self._error(first_held_out)
            if error >= least:
                break
            best, least = candidate, error
        self.projection.weight = nn.Parameter(weight if best is None else best, requires_grad=False)
        return best

    def _error(self, first: int) -> float:
        return sum(float(lacking.double().square().sum()) for _, lacking in self._samples(first, None))

    def _samples(self, first: int, last: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """What the projection reads, [tokens, in], and what its output lacks, [tokens, out], piece by piece.

        Both are divided by the norm of the stream that is wanted, for the next layer norms it: a few tokens of most
        models are hundreds of times as long as the others, and would be all that is fitted to.
        """
        read: list[Tensor] = []
        hook = self.projection.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
        try:
            for piece, wanted in zip(self.states.pieces(first, last), self.wanted.pieces(first, last), strict=True):
                lacking = wanted - self.run(piece, self.angles)
                scale = wanted.square().mean(-1, keepdim=True).clamp(min=torch.finfo().tiny).rsqrt()
                yield (read.pop() * scale).flatten(0, 1), (lacking * scale).flatten(0, 1)
        finally:
            hook.remove()


def moments(samples: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sums of x x^T, [in, in], and of y x^T, [out, in], float64, over samples (x [tokens, in], y [tokens, out])."""
    x, y = next(samples)
    squares, products = (x.mT @ x).double(), (y.mT @ x).double()
    for x, y in samples:
        squares += x.mT @ x
        products += y.mT @ x
    return squares, products


def regression(squares: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The W, [out, in] float64, that makes sum |y - W x|^2 + ridge mean(x^2) |W|^2 smallest, of their `moments`.

    Args:
        squares: sum of x x^T, [in, in].
        products: sum of y x^T, [out, in].
        ridge: more than 0, as a share of the mean square of the numbers of x.
    """
    ridged = squares.clone()
    diagonal = ridged.diagonal()
    diagonal += ridge * diagonal.mean().clamp(min=torch.finfo(torch.float64).eps)  # which nothing is where x is zero
    return torch.cholesky_solve(products.mT, torch.linalg.cholesky(ridged)).mT
