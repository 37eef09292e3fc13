"""How a converted model is healed: what a person may ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from latentkv.errors import TrainingError
from latentkv.ranges import require_range, require_ranges

Trained = Literal["all", "attention", "lora"]


@dataclass(frozen=True)
class HealOptions:
    """How to heal.

    Attributes:
        steps: optimiser steps, those of `match_steps` included.
        match_steps: so many first steps bring each layer's attention nearer to the source's on the source's own states.
        batch_size: sequences a step.
        lr: highest learning rate; a cosine leads from it to a tenth.
        train: "attention" alone, "all" weights (norms and embeddings included), or "lora": low-rank updates of
            attention's projections, which are merged into them in the end.
        lora_rank: of the updates.
        lora_alpha: an update is multiplied by lora_alpha / lora_rank.
        eval_every: steps from one evaluation on held-out text to the next; None: only before and after.
        seed: of the order of the sequences, and of what the updates begin with.
    """

    steps: int = 500
    match_steps: int = 0
    batch_size: int = 8
    lr: float = 1e-3
    train: Trained = "all"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(self, TrainingError)
        if self.eval_every is not None:
            require_range("eval_every", self.eval_every, TrainingError, low=1)
        require_range("match_steps", self.match_steps, TrainingError, high=self.steps)
        if self.train not in get_args(Trained):
            raise TrainingError(f"--train={self.train} is not allowed: choose {', '.join(get_args(Trained))}.")
