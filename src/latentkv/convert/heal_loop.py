"""The steps of a healing, resumable at any of them."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentkv.convert.distances import backward_distance, backward_mismatch
from latentkv.convert.heal_options import HealOptions
from latentkv.convert.quality import Quality, compare
from latentkv.convert.record import read_record
from latentkv.errors import TrainingError
from latentkv.fingerprint import fingerprint
from latentkv.models.decoder import Decoder
from latentkv.saved_values import as_saved
from latentkv.train.checkpoints import Checkpoint, newest_checkpoint, restore_weights, save_checkpoint
from latentkv.train.optimizers import optimizer_tensors, restore_optimizers
from latentkv.train.ranks import DataRanks
from latentkv.train.schedule import warmed_cosine
from latentkv.train.stopping import stop_on_signal
from latentkv.train.weights import MasterWeights

STATE = ".healing"
_SAVE_SECONDS = 60
_WARMUP_STEPS = 20


class Evaluation(Quality):
    """The model beside its source after so many steps, and the tokens that it had been trained on by then."""

    step: int
    healing_tokens: int


@dataclass
class Progress:
    """What a healing has done so far; `number` healings of this model came before it."""

    number: int
    losses: list[float] = field(default_factory=list[float])
    evaluations: list[Evaluation] = field(default_factory=list[Evaluation])
    seconds: float = 0.0


def train(
    student: Decoder,
    teacher: Decoder,
    tokens: Tensor,
    options: HealOptions,
    held_out: Tensor | None,
    folder: Path,
    on_progress: Callable[[str, int, int], object],
    ranks: DataRanks,
) -> Progress | None:
    """Train a student whose norms are out, or go on training it; it is left in evaluation mode.

    Where there are several processes its weights are shared out among them here, and a signal to one stops all.

    Returns:
        What was done; None: a signal has stopped it, and it is saved.
    """
    _choose(student, options)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    ranks.shard(student, dtype)
    # Made before anything is computed, which puts whole weights in their place for a while. Weights that are shared out
    # stay float32 where they lie, and are rounded as they are gathered.
    masters = MasterWeights(student, dtype if ranks.size == 1 else torch.float32)
    weights = masters.by_name
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    texts = (tokens,) if held_out is None else (tokens, held_out)
    identity = {"fingerprint": fingerprint([asdict(options), *(text.numpy().tobytes() for text in texts)])}
    state = folder / STATE
    done = _resume(state, identity, masters, trained, optimizer)
    done = done or Progress(number=len(read_record(folder).get("healings", ())))

    def save(saved: Mapping[str, Tensor]) -> None:
        checkpoint = Checkpoint(saved, optimizer_tensors(trained, [optimizer]), identity | asdict(done))
        save_checkpoint(state, len(done.losses), checkpoint, ranks)

    last_save = time.monotonic()
    student.train()
    # One process that is interrupted ends at once, and goes on from what it saved last; several have to agree.
    with stop_on_signal(together=True) if ranks.size > 1 else nullcontext(list[int]()) as caught:
        for step in range(len(done.losses), options.steps):
            if held_out is not None and step % (options.eval_every or options.steps) == 0:
                quality = compare(teacher, student, held_out, ranks=ranks)
                if not math.isfinite(quality["converted"]):
                    raise _diverged(state, step, options, ranks)
                done.evaluations.append(evaluation(quality, step, tokens, options))
            began = time.monotonic()
            share = warmed_cosine(step, step / options.steps, warmup=_WARMUP_STEPS, floor=options.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * share
            (batch,) = ranks.own(tokens[_batch(step, len(tokens), options)].split(options.batch_size // ranks.size))
            loss = _backward(student, teacher, batch, options, ranks, matching=step < options.match_steps)
            masters.collect_gradients()
            masters.clip_gradients(1.0)
            optimizer.step()
            masters.drop_gradients()
            masters.publish()
            done.losses.append(float(ranks.mean(loss)))
            done.seconds += time.monotonic() - began
            if not math.isfinite(done.losses[-1]):
                raise _diverged(state, step, options, ranks)
            if step < options.match_steps:
                on_progress(f"match layers, error {done.losses[-1]:.4f}, steps", step + 1, options.match_steps)
            else:
                on_progress(f"train, KL {done.losses[-1]:.4f}, steps", step + 1, options.steps)
            due = time.monotonic() - last_save > _SAVE_SECONDS
            stop, done.seconds, due = ranks.agree(stop=bool(caught), elapsed=done.seconds, due=due)
            if stop:
                break
            if due:
                last_save = time.monotonic()
                save(trained)
        # All weights, for those in the folder are about to be replaced: who is killed meanwhile begins from here.
        save(weights)
        masters.withdraw()
        student.eval()
        return None if ranks.any(bool(caught)) else done


def _backward(
    student: Decoder, teacher: Decoder, batch: Tensor, options: HealOptions, ranks: DataRanks, *, matching: bool
) -> Tensor:
    """The gradients of a step's loss; what is told of it: the layers' error, or the KL."""
    if matching:
        return backward_mismatch(student, teacher, batch, ranks)
    return backward_distance(
        student, teacher, batch, ranks, hidden_weight=options.hidden_weight, recompute=options.recompute
    ).divergence


def evaluation(quality: Quality, step: int, tokens: Tensor, options: HealOptions) -> Evaluation:
    """Of what was measured after so many steps."""
    return Evaluation(**quality, step=step, healing_tokens=tokens_after(step, tokens, options))


def tokens_after(step: int, tokens: Tensor, options: HealOptions) -> int:
    """How many tokens so many steps train on, repetitions counted."""
    return step * options.batch_size * tokens.shape[1]


def _diverged(state: Path, step: int, options: HealOptions, ranks: DataRanks) -> TrainingError:
    """The error to raise; what was saved of the run goes, so that another --lr can be tried."""
    if ranks.is_first:
        shutil.rmtree(state, ignore_errors=True)
    return TrainingError(
        f"Healing diverged at step {step}, and {state.parent} stays as it was: give a lower --lr than {options.lr:g}."
    )


def _batch(step: int, count: int, options: HealOptions) -> Tensor:
    """Every sequence once a round, in an order of its own: a function of the step, so that runs resume exactly."""
    per_round = count // options.batch_size
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + step // per_round) % 2**63)
    order = torch.randperm(count, generator=generator)
    first = step % per_round * options.batch_size
    return order[first : first + options.batch_size]


def _choose(student: Decoder, options: HealOptions) -> None:
    """Have those weights alone learn that are to."""
    for name, parameter in student.named_parameters():
        wanted = {
            "all": True,
            "attention": ".self_attn." in name,
            "lora": name.endswith((".lora_a", ".lora_b")),
        }[options.train]
        parameter.requires_grad_(wanted)


def _resume(
    state: Path,
    identity: Mapping[str, str],
    masters: MasterWeights,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress | None:
    """Go back to where an earlier run was interrupted, if one was."""
    refusal = f"{state.parent} holds an unfinished healing with other text or options: repeat those, or remove {state}."
    remedy = f"remove {state} to begin this healing again"
    with newest_checkpoint(state, identity, refusal=refusal, remedy=remedy) as saved:
        if saved is None:
            return None
        done = as_saved(Progress, saved.state)
        restore_weights(masters.by_name, saved.weights, required=trained)
        masters.publish()
        restore_optimizers(trained, [optimizer], saved.optimizer)
    return done
