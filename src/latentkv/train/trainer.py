"""The training loop: batches in, weights out, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.errors import DivergedError, TrainingError
from latentkv.models.decoder import Decoder
from latentkv.saved_values import as_saved
from latentkv.train.balance import LoadBalancer
from latentkv.train.checkpoints import Checkpoint, newest_checkpoint, restore_weights, save_checkpoint
from latentkv.train.evaluate import EvalSet, bits_per_byte
from latentkv.train.loss import backward_language_loss
from latentkv.train.optimizers import build_optimizers, optimizer_tensors, restore_optimizers
from latentkv.train.options import TrainOptions
from latentkv.train.ranks import DataRanks, number_of
from latentkv.train.report import Reporter
from latentkv.train.schedule import learning_rate, progress
from latentkv.train.weights import MasterWeights
from latentkv.train.windows import Windows


@dataclass
class Clock:
    """Seconds of training, carried over from run to run; evaluation and saving count too."""

    before: float = 0.0
    started: float = 0.0

    def start(self) -> None:
        """Begin (or go on) counting."""
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds spent so far."""
        return self.before + (time.monotonic() - self.started if self.started else 0.0)


@dataclass(frozen=True)
class _Moment:
    """What a checkpoint says of its run, besides tensors and the run's identity."""

    step: int
    elapsed: float
    options: dict[str, Any]


class Trainer:
    """Trains one decoder on the CPU, in one process or in several that each take part of every batch."""

    def __init__(
        self,
        model: Decoder,
        windows: Windows,
        options: TrainOptions,
        *,
        mtp_layers: int = 0,
        evaluations: Sequence[EvalSet] = (),
        identity: str = "",
        ranks: DataRanks | None = None,
    ) -> None:
        """Prepare to train.

        Args:
            model: its parameters are float32.
            windows: the data.
            options: the recipe.
            mtp_layers: multi-token-prediction layers that the model has.
            evaluations: held-out texts.
            identity: fingerprint of data and model, checked on resume.
            ranks: the processes that train it together; the model's parameters are shared out among them here.

        Raises:
            TrainingError: a step has not as many micro-batches for each process.
        """
        self.ranks = ranks or DataRanks()
        micro_batches = options.batch_size // options.micro_batch
        if micro_batches % self.ranks.size:
            raise TrainingError(
                f"A step of {micro_batches} micro-batches cannot be shared out among {self.ranks.size} processes: make "
                "--batch-tokens a multiple of --seq-len x --micro-batch x processes."
            )
        self.options = options
        self.step = 0
        self.clock = Clock()
        self._elapsed = 0.0
        self._model = model
        self._windows = windows
        self._mtp_layers = mtp_layers if options.mtp_weight > 0 else 0
        self._evaluations = evaluations
        self._identity = identity
        self._buffers = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
        self._balancer = LoadBalancer(model.moe_layers(), options.bias_speed, self.ranks.total)
        dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.ranks.shard(model, dtype)
        # Weights that are shared out stay float32 where they lie, and are rounded as they are gathered.
        self.weights = MasterWeights(model, dtype if self.ranks.size == 1 else torch.float32)
        self._optimizers = build_optimizers(self.weights.by_name, options)

    @property
    def done(self) -> float:
        """The fraction of training that is behind us, by the time at the end of the last step."""
        return progress(self.options, self.step, self._elapsed)

    def run(self, folder: Path, reporter: Reporter, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the end, or until `should_stop`; save checkpoints on the way.

        Returns:
            Whether training is complete.
        """
        self.clock.start()
        saved = time.monotonic()
        since = (self.step, time.monotonic())
        stop, due = self._agree(should_stop(), saved)
        while self.done < 1.0:
            if due:
                self.save(folder)
                saved = time.monotonic()
            if stop:
                self.save(folder)
                return False
            record = self.train_step()
            now = time.monotonic()
            stop, due = self._agree(should_stop(), saved)
            record["done"] = self.done
            record["tokens_per_second"] = (self.step - since[0]) * self.options.batch_tokens / (now - since[1])
            record["eta"] = self._elapsed * (1 / max(self.done, 1e-9) - 1)
            reporter.live(record | {"steps": self.options.steps})
            if self.step % self.options.log_every == 0 or self.step == 1 or self.done >= 1.0:
                reporter.log(record)
                since = (self.step, now)
            if self.options.eval_every and self.step % self.options.eval_every == 0 and self.done < 1.0:
                reporter.log(self.evaluate())
                since = (self.step, time.monotonic())
        if self._evaluations:
            reporter.log(self.evaluate())
        self.save(folder)
        return True

    def _agree(self, stop: bool, saved: float) -> tuple[bool, bool]:
        """Whether to stop, and whether to save: what all processes go by, and the time that they go by."""
        due = time.monotonic() - saved > 60 * self.options.save_minutes
        stop, self._elapsed, due = self.ranks.agree(stop=stop, elapsed=self.clock.elapsed, due=due)
        return stop, due

    def train_step(self) -> dict[str, Any]:
        """One optimiser step on the batch that belongs to it; its log record."""
        options, done = self.options, self.done
        rate = learning_rate(options, self.step, done)
        batches = self.ranks.own(self._windows.batch(self.step).split(options.micro_batch))
        mtp_layers = self._mtp_layers if done >= options.mtp_start else 0
        losses: list[Tensor] = []
        for tokens in batches:
            both = backward_language_loss(
                self._model,
                tokens,
                options.seq_len,
                mtp_layers=mtp_layers,
                mtp_weight=options.mtp_weight,
                weight=1 / len(batches),
            )
            self._balancer.count()
            self.weights.collect_gradients()
            losses.append(torch.stack(both))
        loss, mtp_loss = self.ranks.mean(torch.stack(losses).mean(0)).tolist()
        norm = number_of(self.weights.clip_gradients(options.grad_clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"Training diverged at step {self.step} (loss {loss}, gradient norm {norm}): resume from the last "
                "checkpoint with a smaller --lr."
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.weights.drop_gradients()
        self.weights.publish()
        load = self._balancer.update(fade=1 - done)
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * options.batch_tokens,
            "epochs": self._windows.epochs(self.step),
            "loss": loss,
            "mtp_loss": mtp_loss,
            "lr": rate,
            "grad_norm": norm,
            "load": load,
            "done": self.done,
        }

    def evaluate(self) -> dict[str, Any]:
        """Bits per byte of every held-out text, as a log record."""
        scores = {
            one.name: bits_per_byte(self._model, one, seq_len=self.options.seq_len, batch_size=self.options.micro_batch)
            for one in self._evaluations
        }
        return {"step": self.step, "tokens": self.step * self.options.batch_tokens, "bits_per_byte": scores}

    def save(self, folder: Path) -> None:
        """Write a checkpoint of this moment."""
        moment = _Moment(self.step, self.clock.elapsed, self.options.to_dict())
        state = asdict(moment) | {"identity": self._identity}
        tensors = {**self.weights.by_name, **self._buffers}
        optimizer = optimizer_tensors(self.weights.by_name, self._optimizers)
        save_checkpoint(folder, self.step, Checkpoint(tensors, optimizer, state), self.ranks)

    def resume(self, folder: Path) -> bool:
        """Go on from the newest checkpoint in `folder`; whether there was one."""
        refusal = (
            f"{folder} holds checkpoints of other data, another tokenizer or another model: give the same ones, "
            "another --out, or --restart."
        )
        remedy = "remove it to resume from the one before, or give --restart"
        with newest_checkpoint(folder, {"identity": self._identity}, refusal=refusal, remedy=remedy) as checkpoint:
            if checkpoint is None:
                return False
            moment = as_saved(_Moment, checkpoint.state)
            self.options.check_resumes(moment.options)
            if moment.step < 0 or not 0 <= moment.elapsed < math.inf:
                raise ValueError(f"step {moment.step} after {moment.elapsed} seconds")
            restore_weights({**self.weights.by_name, **self._buffers}, checkpoint.weights)
            self.weights.publish()
            restore_optimizers(self.weights.by_name, self._optimizers, checkpoint.optimizer)
        self.step, self.clock.before, self._elapsed = moment.step, moment.elapsed, moment.elapsed
        return True
