"""Expert load balancing without an auxiliary loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentkv.models.moe import MoE


class LoadBalancer:
    """Counts the tokens that each expert got in a step, then raises the bias of the idle and lowers the busy ones'."""

    def __init__(
        self, layers: Sequence[MoE], speed: float, total: Callable[[Tensor], Tensor] = lambda counts: counts
    ) -> None:
        """`layers` with a correction bias are balanced; `speed` is what one step adds or takes away.

        `total` adds the counts of all processes that train together up.
        """
        self._total = total
        self._layers = [layer for layer in layers if layer.gate.e_score_correction_bias is not None]
        self._speed = speed
        self._loads: list[Tensor | None] = [None] * len(self._layers)

    def count(self) -> None:
        """Take the counts of the forward pass just run. A layer that did not run counts nothing."""
        for i, layer in enumerate(self._layers):
            counts, load = layer.expert_counts, self._loads[i]
            if counts is not None:
                self._loads[i] = counts if load is None else load + counts
                layer.expert_counts = None

    @torch.no_grad()
    def update(self, fade: float = 1.0) -> float:
        """Move the biases by the step's loads and forget them.

        Args:
            fade: what `speed` is multiplied by; towards 0 at the end of training, so that the experts settle.

        Returns:
            The worst layer's largest load over its mean load (1 is perfect balance; 0 without routed layers).
        """
        worst = 0.0
        for layer, load in zip(self._layers, self._loads, strict=True):
            if load is None:
                continue
            load = self._total(load)
            if not int(load.sum()):
                continue
            mean = load.float().mean()
            bias = layer.gate.e_score_correction_bias
            if bias is not None:
                bias.add_(torch.sign(mean - load), alpha=self._speed * fade)
            worst = max(worst, float(load.max() / mean))
        self._loads = [None] * len(self._layers)
        return worst
