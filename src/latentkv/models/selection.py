"""What layers of one step leave to those after them."""

from __future__ import annotations

from torch import Tensor


class Selection:
    """What the last indexer of a step selected, for the layers after it that have none of their own (arXiv 2603.12201).

    Attributes:
        tokens: [T, topk] cache slots, or of whole sequences [B, S, S] bool; None: every token that is seen.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None


class Shortcut:
    """What a layer's feed-forward block read, for the experts of the next one (ScMoE, arXiv 2404.05019).

    Attributes:
        x: [T, hidden], or of whole sequences [B, S, hidden]; None: no shortcut has begun.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
