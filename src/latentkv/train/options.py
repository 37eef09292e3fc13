"""`TrainOptions`, everything that decides how a training run goes, and `TrainingPlan`: of what."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from latentkv.errors import TrainingError
from latentkv.option_types import Flag
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
        steps: train this many steps; such a run is reproducible bit for bit on the same machine and threads.
        time_limit: or train this many minutes; the learning rate follows the clock, so two runs differ.
        seq_len: tokens a sequence.
        batch_tokens: tokens an optimiser step, a multiple of `seq_len` x `micro_batch`.
        micro_batch: sequences a forward and backward pass (memory; not results).
        optimizer: adamw, or muon: Muon for hidden matrices and AdamW for the rest.
        lr: peak learning rate; Muon's update is scaled to AdamW's size, so one rate serves both.
        min_lr: where the cosine ends, as a fraction of `lr`.
        warmup: steps of linear warm-up.
        weight_decay: decoupled weight decay, on matrices only.
        betas: AdamW's.
        momentum: Muon's.
        grad_clip: largest norm of the gradient; 0 does not clip.
        dtype: dtype that the model computes in, bf16 or fp32; weights and optimiser state are float32 in either case.
        mtp_weight: weight of the multi-token-prediction loss (DeepSeek-V3 section 2.2); 0 is off.
        mtp_start: fraction of training after which that loss joins.
        bias_speed: step of the correction bias that balances experts (arXiv 2408.15664); short runs need more, such as
            0.02.
        seed: seed of initialisation and data order.
        eval_every: steps between evaluations; 0 evaluates only at the end.
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


@dataclass(frozen=True)
class TrainingPlan:
    """What to train, on what, and where the result goes.

    Attributes:
        data: folder of .txt files, or one text file.
        out: folder for the model, checkpoints and logs; a run goes on with what it holds.
        config: a config.json to train from scratch; may be None with `init`.
        init: start from this model instead of fresh weights: a folder, or a repo id, also as org/name@revision.
        tokenizer: a model whose tokenizer to take; None is that of `init`, or a BPE trained on the data.
        exclude: name of a file to keep out of training and tokenizer; repeatable.
        eval_files: text to report bits per byte of, never trained on; repeatable.
        eval_fraction: where no text to evaluate on is named: hold out this much of each file.
        eval_bytes: about how much text to evaluate on.
        rope_scaling: stretch the context of `init`, by yarn:8 eightfold, say, for a longer `seq_len`.
        restart: forget an earlier run in `out`.
        encoded: folder for the encoded text, which runs on the same text share; None is a folder in `out`.
        command: how the run was started, for training.json.
    """

    data: Annotated[Path, Flag(exists=True)]
    out: Path
    config: Path | None = None
    init: Path | None = None
    tokenizer: Path | None = None
    exclude: tuple[str, ...] = ()
    eval_files: Annotated[tuple[Path, ...], Flag(("--eval-file",), exists=True)] = ()
    eval_fraction: float = 0.01
    eval_bytes: int = 200_000
    rope_scaling: str | None = None
    restart: bool = False
    encoded: Path | None = None
    command: tuple[str, ...] = dataclasses.field(default_factory=lambda: tuple(sys.argv))

    @property
    def tokens_file(self) -> Path:
        """Where the encoded text lies; what it was made from is beside it."""
        return (self.encoded or self.out / "data") / "tokens.bin"
