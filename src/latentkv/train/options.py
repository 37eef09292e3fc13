"""`TrainOptions`: everything that decides how a training run goes, validated once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from latentkv.errors import TrainingError
from latentkv.ranges import require_ranges

# Options that change what a step computes: a run resumes only with the same ones.
FIXED_ON_RESUME = (
    "seq_len",
    "batch_tokens",
    "micro_batch",
    "optimizer",
    "betas",
    "momentum",
    "weight_decay",
    "grad_clip",
    "dtype",
    "seed",
    "mtp_weight",
)


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Exactly one of `steps` and `time_limit` is set.

    Attributes:
        steps: optimiser steps in all; such a run is reproducible bit for bit on the same machine and threads.
        time_limit: minutes of training in all; the learning rate follows the clock, so two runs differ.
        seq_len: tokens a sequence.
        batch_tokens: tokens an optimiser step (a multiple of seq_len x micro_batch).
        micro_batch: sequences a forward and backward pass.
        optimizer: "adamw", or "muon": Muon for hidden matrices and AdamW for the rest.
        lr: peak learning rate; Muon's update is scaled to AdamW's size, so one rate serves both.
        min_lr: where the cosine ends, as a fraction of lr.
        warmup: steps of linear warm-up.
        weight_decay: decoupled, on matrices only.
        betas: AdamW's.
        momentum: Muon's.
        grad_clip: largest norm of the gradient (0: no clipping).
        dtype: what the model computes in; weights and optimiser state are float32 in either case.
        mtp_weight: weight of the multi-token-prediction loss (0: off; DeepSeek-V3 section 2.2).
        mtp_start: fraction of training after which that loss joins.
        bias_speed: step of the correction bias that balances experts (arXiv 2408.15664).
        seed: of initialisation and data order.
        eval_every: steps between evaluations (0: only at the end).
        save_minutes: minutes between checkpoints.
        log_every: steps between log lines.
    """

    steps: int | None = None
    time_limit: float | None = None
    seq_len: int = 512
    batch_tokens: int = 16384
    micro_batch: int = 4
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    min_lr: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    grad_clip: float = 1.0
    dtype: Literal["bf16", "fp32"] = "bf16"
    mtp_weight: float = 0.3
    mtp_start: float = 0.0
    bias_speed: float = 1e-3
    seed: int = 0
    eval_every: int = 200
    save_minutes: float = 5.0
    log_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        if (self.steps is None) == (self.time_limit is None):
            raise TrainingError("Say how long to train: either --steps or --time-limit, one of the two.")
        require_ranges(self, TrainingError)
        self._check("optimizer", self.optimizer in ("adamw", "muon"), "adamw or muon")
        self._check("dtype", self.dtype in ("bf16", "fp32"), "bf16 or fp32")
        if self.batch_tokens % (self.seq_len * self.micro_batch):
            raise TrainingError(
                f"--batch-tokens {self.batch_tokens} must be a multiple of --seq-len x --micro-batch "
                f"({self.seq_len} x {self.micro_batch} = {self.seq_len * self.micro_batch})."
            )

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise TrainingError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)}.")

    @property
    def batch_size(self) -> int:
        """Sequences an optimiser step."""
        return self.batch_tokens // self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON stores them."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        return values

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Refuse to continue a run that was started with other mathematics."""
        now = self.to_dict()
        changed = [
            f"{name} ({saved.get(name)} -> {now[name]})" for name in FIXED_ON_RESUME if saved.get(name) != now[name]
        ]
        if changed:
            raise TrainingError(
                f"The checkpoint to resume was made with other options: {', '.join(changed)}; "
                "give the same ones, another --out, or --restart."
            )
