"""What a model expects of a text: `Perplexity`, how well that is what stands there, and `Prediction`, all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp(nats / tokens).
        bits_per_byte: nats / (ln 2 * bytes), comparable between tokenizers.
        nats: summed -log p of all scored tokens.
        tokens: scored tokens: the text's, without BOS.
        bytes: of the text in UTF-8.
    """

    perplexity: float
    bits_per_byte: float
    nats: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, nats: float, tokens: int, num_bytes: int) -> Perplexity:
        """Of what was scored: summed -log p of so many tokens, which are a text of so many bytes."""
        return cls(math.exp(nats / tokens), nats / (math.log(2) * num_bytes), nats, tokens, num_bytes)


@dataclass(frozen=True)
class Prediction:
    """What a model expects of a text.

    Attributes:
        perplexity: how well that is what stands there.
        likeliest: the likeliest token in the place of each of the text's.
    """

    perplexity: Perplexity
    likeliest: tuple[int, ...]

    def agreement(self, other: Prediction) -> float:
        """The share of places in which both expect the same token.

        Raises:
            ValueError: they are of different texts, or of models with different tokenizers.
        """
        return sum(a == b for a, b in zip(self.likeliest, other.likeliest, strict=True)) / len(self.likeliest)
