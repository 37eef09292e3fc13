"""What all arms of a comparison have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from latentkv.errors import RequestError
from latentkv.option_types import Flag
from latentkv.ranges import require_range

BASELINE = "mha"
WIDTH_STEP = 8
"""The feed-forward layer's width is a multiple of this."""
MAX_POSITIONS = 8192
"""Longer than the text trained on, so that decoding can be timed over a deep cache."""


@dataclass(frozen=True)
class Sizes:
    """What all arms have in common.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: decoder layers, all with the arm's attention and a dense feed-forward layer.
        num_heads: query heads a layer, which share the width out.
        vocab_size: tokens of the tokenizer, which is trained once for all arms.
    """

    hidden_size: Annotated[int, Flag(("--hidden",))] = 128
    num_layers: Annotated[int, Flag(("--layers",))] = 4
    num_heads: Annotated[int, Flag(("--heads",))] = 8
    vocab_size: Annotated[int, Flag(("--vocab",))] = 1024

    def __post_init__(self) -> None:
        """Refuse sizes that no arm can have."""
        for name in ("hidden_size", "num_layers", "num_heads", "vocab_size"):
            require_range(name.removesuffix("_size").removeprefix("num_"), getattr(self, name), RequestError)
        if self.hidden_size % (4 * self.num_heads):
            raise RequestError(
                f"--hidden {self.hidden_size} gives {self.num_heads} heads no width that is a multiple of 4 (half of "
                "it carries the rotary embedding of MLA): change --hidden or --heads."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head: of query, key and value; of MLA the part without rotary embedding, and the value."""
        return self.hidden_size // self.num_heads

    @property
    def rope_dim(self) -> int:
        """Width of MLA's shared key with rotary embedding: half a head, as in DeepSeek-V2 (arXiv 2405.04434)."""
        return self.head_dim // 2

    @property
    def init_std(self) -> float:
        """Standard deviation of the first weights: it follows the width, because 0.02, which is meant for wide models,
        leaves the attention of a narrow one nearly idle at first, that of MHA for longest.
        """
        return 0.5 / math.sqrt(self.hidden_size)

    @property
    def mha_width(self) -> int:
        """The feed-forward layer of MHA: 8/3 of hidden_size, so that its three matrices hold what two of 4x would."""
        return max(WIDTH_STEP, round(8 * self.hidden_size / 3 / WIDTH_STEP) * WIDTH_STEP)
