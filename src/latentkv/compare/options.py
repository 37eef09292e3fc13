"""What is compared and how, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from latentkv.compare.sizes import BASELINE, MAX_POSITIONS, Sizes
from latentkv.errors import RequestError
from latentkv.option_types import Flag, Floats, Words
from latentkv.ranges import require_range, require_ranges
from latentkv.train import TrainOptions

if TYPE_CHECKING:
    from latentkv.compare.arms import Arm

Match = Literal["parameters", "none"]

SWEEP_SEED = 0
"""The final seeds are 1, 2, ..."""
SWEEP_PART = 3
"""A run that only chooses a learning rate has a third of the steps."""
_WARMUP_PART = 20
_LARGEST_MICRO_BATCH = 8


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    Attributes:
        sizes: what the models have in common.
        arms: attentions to compare: mha, gqa-GROUPS, mqa and mla-RANK, with commas between; without any mha, gqa and
            mqa, and mla with as large a cache as these and with 1/16 of mha's.
        match: "parameters": as many in each arm, by the feed-forward layer's width; "none": one width.
        seeds: full runs of each arm.
        steps: steps of a full run; a third of it to choose a learning rate.
        rates: peak learning rates to choose from, for each arm by itself; a single one is taken without trying.
        seq_len: tokens a sequence.
        batch_tokens: tokens an optimiser step, a multiple of `seq_len`.
        eval_bytes: about how much held-out text to measure on.
    """

    sizes: Sizes = field(default_factory=Sizes)
    arms: Words = ()
    match: Match = "parameters"
    seeds: int = 3
    steps: int = 960
    rates: Annotated[Floats, Flag(("--lrs",))] = (1e-3, 2e-3, 4e-3)
    seq_len: int = 256
    batch_tokens: int = 1024
    eval_bytes: int = 200_000

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if self.match not in get_args(Match):
            raise RequestError(f"--match={self.match} is not known: choose {' or '.join(get_args(Match))}.")
        require_ranges(self, RequestError)
        require_range("steps", self.steps, RequestError, low=SWEEP_PART)
        require_range("seq_len", self.seq_len, RequestError, low=2, high=MAX_POSITIONS)
        if not self.rates:
            raise RequestError("--lrs names no learning rate: write one or more, such as 1e-3,2e-3,4e-3.")
        for rate in self.rates:
            require_range("lrs", rate, RequestError)
        if self.batch_tokens % self.seq_len:
            raise RequestError(f"--batch-tokens {self.batch_tokens} must be a multiple of --seq-len {self.seq_len}.")
        arms = self.list_arms()
        names = [arm.name for arm in arms]
        if BASELINE not in names:
            raise RequestError(f"--arms must name {BASELINE}: it is what the others are compared with.")
        if len(names) < 2 or len(set(names)) < len(names):
            raise RequestError("--arms must name two or more attentions, each once.")
        for arm in arms:
            self.width(arm)

    def list_arms(self) -> list[Arm]:
        """What is compared, in order."""
        from latentkv.compare.arms import (  # which --help, that reads the fields, does not wait for
            default_arms,
            parse_arm,
        )

        return [parse_arm(name, self.sizes) for name in self.arms or default_arms(self.sizes)]

    def width(self, arm: Arm) -> int:
        """Of the arm's feed-forward layer."""
        from latentkv.compare.arms import matched_width

        return matched_width(arm, self.sizes) if self.match == "parameters" else self.sizes.mha_width

    @property
    def sweep_steps(self) -> int:
        """Of a run that only chooses a learning rate."""
        return self.steps // SWEEP_PART

    def training(self, *, steps: int, rate: float, seed: int) -> TrainOptions:
        """One run: AdamW in float32, so that every arm's attention goes through the same kernels of torch."""
        return TrainOptions(
            steps=steps,
            seq_len=self.seq_len,
            batch_tokens=self.batch_tokens,
            micro_batch=math.gcd(self.batch_tokens // self.seq_len, _LARGEST_MICRO_BATCH),
            lr=rate,
            warmup=steps // _WARMUP_PART,
            dtype="fp32",
            seed=seed,
            eval_every=0,
            save_minutes=1.0,
            log_every=max(1, steps // 4),
        )

    def fixed(self) -> dict[str, Any]:
        """By option: what decides a run's result, besides arm, learning rate and seed, which may be added to later."""
        sizes = self.sizes
        return {
            "hidden": sizes.hidden_size,
            "layers": sizes.num_layers,
            "heads": sizes.num_heads,
            "vocab": sizes.vocab_size,
            "match": self.match,
            "steps": self.steps,
            "seq-len": self.seq_len,
            "batch-tokens": self.batch_tokens,
            "eval-bytes": self.eval_bytes,
        }
