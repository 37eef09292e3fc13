"""How a converted model is healed: what a person may ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from latentkv.errors import TrainingError
from latentkv.ranges import require_range, require_ranges

Trained = Literal["all", "attention", "lora"]
Computed = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class HealOptions:
    """How to heal.

    Attributes:
        steps: optimiser steps, those of `match_steps` included.
        match_steps: how many of these come first and bring each layer's attention nearer to the source's, on the
            source's own states.
        batch_size: sequences a step.
        lr: highest learning rate.
        min_lr: where the cosine ends that leads down from it, as a fraction of `lr`.
        hidden_weight: the loss is KL(source || converted) plus this times the relative squared error of the states
            after the last norm.
        train: what learns: all weights, attention, or lora: low-rank updates of attention's projections, which are
            merged into them in the end.
        lora_rank: rank of the updates, with `train` lora.
        lora_alpha: an update counts alpha / rank times.
        dtype: dtype that the models compute in, bf16 or fp32; trained weights and the optimiser's state are float32 in
            either case.
        recompute: keep only each layer's input for the backward pass: less memory, a third more time.
        eval_every: steps from one evaluation on held-out text to the next; None is only before and after.
        seed: of the order of the sequences, and of what the updates begin with.
    """

    steps: int = 500
    match_steps: int = 0
    batch_size: int = 8
    lr: float = 1e-3
    min_lr: float = 0.1
    hidden_weight: float = 0.0
    train: Trained = "all"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    dtype: Computed = "fp32"
    recompute: bool = False
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(self, TrainingError)
        if self.eval_every is not None:
            require_range("eval_every", self.eval_every, TrainingError, low=1)
        require_range("match_steps", self.match_steps, TrainingError, high=self.steps)
        for name, allowed in (("train", get_args(Trained)), ("dtype", get_args(Computed))):
            if (asked := getattr(self, name)) not in allowed:
                raise TrainingError(f"--{name}={asked} is not allowed: choose {', '.join(allowed)}.")
