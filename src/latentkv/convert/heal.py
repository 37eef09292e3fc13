"""`heal_checkpoint`: a converted model learns what its source predicts (KL alone: X-EcoMLA, arXiv 2503.11132)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv.convert.lora import low_rank_updates
from latentkv.convert.norms import without_norms
from latentkv.convert.quality import Quality, compare
from latentkv.convert.record import add_healing, read_record, require_record
from latentkv.errors import TrainingError
from latentkv.models.config import MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.stored_config import stored_dtype
from latentkv.ranges import require_range, require_ranges
from latentkv.saved_values import as_saved, saved_in
from latentkv.targets import require_folder
from latentkv.train.checkpoints import Checkpoint, list_checkpoints, load_checkpoint, restore_weights, save_checkpoint
from latentkv.train.optimizers import optimizer_tensors, restore_optimizers
from latentkv.train.schedule import warmed_cosine

_STATE = ".healing"
_SAVE_SECONDS = 60
_WARMUP_STEPS = 20
_FLOOR = 0.1  # of the learning rate, at the end
_CURVE_POINTS = 200


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


class Evaluation(Quality):
    """The model beside its source after so many steps, and the tokens that it had been trained on by then."""

    step: int
    healing_tokens: int


@dataclass(frozen=True)
class Healing:
    """What healing did.

    Attributes:
        losses: [steps] KL(source || converted) in nats a token, of each step's batch before the step; while layers are
            matched, the mean over layers of |converted - source|^2 / |source|^2.
        evaluations: on held-out text, before the first step, every `eval_every` steps, and of the weights as they are
            stored in the end; none without such text.
        tokens: that were trained on, repetitions counted.
        seconds: of training; evaluations are not counted.
    """

    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    tokens: int
    seconds: float


@dataclass
class _Progress:
    """What a healing has done so far; `number` healings of this model came before it."""

    number: int
    losses: list[float] = field(default_factory=list[float])
    evaluations: list[Evaluation] = field(default_factory=list[Evaluation])
    seconds: float = 0.0


def heal_checkpoint(
    folder: Path,
    teacher: Path,
    tokens: Tensor,
    options: HealOptions,
    *,
    held_out: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> Healing:
    """Train the converted model in `folder` in place; an interrupted run goes on when called again.

    What was done is added to the folder's report. The model there is replaced only by one that is finite and whose
    KL(source || converted) on text that it was not trained on is no larger than before; else it stays as it is.

    Args:
        folder: of a converted model.
        teacher: its source.
        tokens: [sequences, length] int64 text, of the source or of what the model is for.
        options: how.
        held_out: [sequences, length] int64 text to evaluate on; None: the last of `tokens` (see `hold_out`), which
            are then not trained on, and of which the report says nothing.
        about: further facts for the report, such as where the texts are from.
        on_progress: called with the stage, and how much of it is done and of how much.

    Raises:
        TrainingError: the models do not belong together (see `require_healable`), there are fewer sequences than a
            batch needs, an interrupted run cannot be gone on with, or healing would make the model worse.
        CheckpointError: a model cannot be read or written.
    """
    require_healable(folder, teacher, options)
    guard = held_out
    if guard is None:
        tokens, guard = hold_out(tokens)
    if len(tokens) < options.batch_size:
        raise TrainingError(
            f"{len(tokens)} sequences to train on are fewer than a batch of {options.batch_size}: give more text, or a "
            "smaller --batch-size."
        )
    student = load_model(folder, dtype=torch.float32)
    source = load_model(teacher, dtype=torch.float32).requires_grad_(False)

    def measured(stage: str) -> Quality:
        return compare(source, student, guard, on_progress=lambda done, total: on_progress(stage, done, total))

    before = measured("measure before, sequences")
    with without_norms(student), _updates(student, options):
        done = _train(student, source, tokens, options, held_out, folder, on_progress)
    dtype = stored_dtype(student.config)
    _round(student, dtype)
    after = measured("measure after, sequences")
    _require_no_worse(folder, student, before, after, options)
    if held_out is not None:
        done.evaluations.append(_evaluation(after, options.steps, tokens, options))
    healing = Healing(
        tuple(done.losses), tuple(done.evaluations), _tokens_after(options.steps, tokens, options), done.seconds
    )
    save_pretrained(student, folder, dtype=dtype)
    add_healing(folder, dict(about or {}) | _described(healing, tokens, options), number=done.number)
    shutil.rmtree(folder / _STATE, ignore_errors=True)
    return healing


def hold_out(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences to train on, and the last sixteenth of them (one at least), to measure on.

    Args:
        tokens: [sequences, length] int64.
    """
    count = held_out_sequences(len(tokens))
    return tokens[: len(tokens) - count], tokens[len(tokens) - count :]


def held_out_sequences(count: int) -> int:
    """How many of `count` sequences `hold_out` holds out."""
    return max(1, count // 16)


def require_healable(folder: Path, teacher: Path, options: HealOptions) -> None:
    """Refuse what `heal_checkpoint` cannot heal, by the two configs alone: before any text or weight is read.

    Raises:
        TrainingError: the target is the teacher, was not converted or cannot be written, or the two do not fit.
        ConfigError: a config cannot be read.
    """
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder: name the model that `latentkv convert` wrote.")
    require_folder(folder, TrainingError, apart=[("the teacher", teacher)])
    student, source = read_config(folder), read_config(teacher)
    if not isinstance(student.attention, MLAConfig):
        raise TrainingError(f"{folder} has no latent attention: heal what `latentkv convert` wrote.")
    shapes = ("vocab_size", "hidden_size", "num_layers") if options.match_steps else ("vocab_size",)
    for name in shapes:
        ours, theirs = getattr(student, name), getattr(source, name)
        if ours != theirs:
            raise TrainingError(
                f"{teacher} is not the source of {folder}, whose {name} is {ours:,}, not {theirs:,}: give the model "
                "that was converted as --teacher."
            )
    require_record(folder)


def _require_no_worse(folder: Path, student: Decoder, before: Quality, after: Quality, options: HealOptions) -> None:
    """Refuse, before anything is replaced, a model that is not finite or farther from its source than it was."""
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters())
    if finite and math.isfinite(after["converted"]) and after["divergence"] <= before["divergence"]:
        return
    shutil.rmtree(folder / _STATE, ignore_errors=True)  # so that another --lr can be tried
    what = f"{before['divergence']:.4g} before, {after['divergence']:.4g} after" if finite else "weights not finite"
    raise TrainingError(
        f"Healing would make {folder} worse (KL to the source on held-out text: {what}), so it stays as it was: give a "
        f"lower --lr than {options.lr:g}, or more text."
    )


def _train(
    student: Decoder,
    teacher: Decoder,
    tokens: Tensor,
    options: HealOptions,
    held_out: Tensor | None,
    folder: Path,
    on_progress: Callable[[str, int, int], object],
) -> _Progress:
    trained = dict(_trained(student, options))
    optimizer = torch.optim.AdamW(trained.values(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    fingerprint = _fingerprint(tokens, options, held_out)
    state = folder / _STATE
    done = _resume(state, student, trained, optimizer, fingerprint)
    done = done or _Progress(number=len(read_record(folder).get("healings", ())))

    def save(weights: Mapping[str, Tensor]) -> None:
        moment = {"fingerprint": fingerprint} | asdict(done)
        save_checkpoint(
            state, len(done.losses), Checkpoint(dict(weights), optimizer_tensors(trained, [optimizer]), moment)
        )

    saved = time.monotonic()
    student.train()
    for step in range(len(done.losses), options.steps):
        if held_out is not None and step % (options.eval_every or options.steps) == 0:
            quality = compare(teacher, student, held_out)
            if not math.isfinite(quality["converted"]):
                raise _diverged(state, step, options)
            done.evaluations.append(_evaluation(quality, step, tokens, options))
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warmed_cosine(step, step / options.steps, warmup=_WARMUP_STEPS, floor=_FLOOR)
        batch = tokens[_batch(step, len(tokens), options)]
        measure = _mismatch if step < options.match_steps else _divergence
        loss = measure(student, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        done.losses.append(float(loss.detach()))
        done.seconds += time.monotonic() - began
        if not math.isfinite(done.losses[-1]):
            raise _diverged(state, step, options)
        if step < options.match_steps:
            on_progress(f"match layers, error {done.losses[-1]:.4f}, steps", step + 1, options.match_steps)
        else:
            on_progress(f"train, KL {done.losses[-1]:.4f}, steps", step + 1, options.steps)
        if time.monotonic() - saved > _SAVE_SECONDS:
            saved = time.monotonic()
            save(trained)
    # All weights, for those in the folder are about to be replaced: a run that is killed meanwhile begins from here.
    save(dict(student.named_parameters()))
    student.eval()
    return done


def _updates(student: Decoder, options: HealOptions) -> AbstractContextManager[None]:
    if options.train != "lora":
        return nullcontext()
    return low_rank_updates(student, rank=options.lora_rank, alpha=options.lora_alpha, seed=options.seed)


def _diverged(state: Path, step: int, options: HealOptions) -> TrainingError:
    """The error to raise; what was saved of the run goes, so that another --lr can be tried."""
    shutil.rmtree(state, ignore_errors=True)
    return TrainingError(
        f"Healing diverged at step {step}, and {state.parent} stays as it was: give a lower --lr than {options.lr:g}."
    )


def _evaluation(quality: Quality, step: int, tokens: Tensor, options: HealOptions) -> Evaluation:
    return Evaluation(**quality, step=step, healing_tokens=_tokens_after(step, tokens, options))


@torch.no_grad()
def _round(student: Decoder, dtype: torch.dtype) -> None:
    """To the numbers that will be stored."""
    for parameter in student.parameters():
        parameter.copy_(parameter.to(dtype))


def _tokens_after(step: int, tokens: Tensor, options: HealOptions) -> int:
    return step * options.batch_size * tokens.shape[1]


def _described(healing: Healing, tokens: Tensor, options: HealOptions) -> dict[str, Any]:
    """For the report: losses as [tokens seen, mean loss since the point before]."""
    cut = min(options.match_steps, options.steps)

    def curve(first: int, last: int) -> list[tuple[int, float]]:
        width = max(1, -(-(last - first) // _CURVE_POINTS))
        windows = [range(start, min(start + width, last)) for start in range(first, last, width)]
        return [
            (_tokens_after(steps.stop, tokens, options), sum(healing.losses[step] for step in steps) / len(steps))
            for steps in windows
        ]

    facts = asdict(healing)
    del facts["losses"]
    return asdict(options) | facts | {"matching": curve(0, cut), "curve": curve(cut, options.steps)}


def _divergence(student: Decoder, teacher: Decoder, batch: Tensor) -> Tensor:
    """KL(teacher || student) in nats a token."""
    with torch.no_grad():
        wanted = teacher.logits(teacher.forward_train(batch)).log_softmax(-1)
    found = student.logits(student.forward_train(batch)).log_softmax(-1)
    return functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def _mismatch(student: Decoder, teacher: Decoder, batch: Tensor) -> Tensor:
    """|converted - source|^2 / |source|^2 of the attention's output, mean over layers, on the source's own states."""
    x = teacher.embed(batch)
    positions, own = (model.angles(batch.shape[1]) for model in (teacher, student))
    total = torch.zeros(())
    layers = zip(teacher.model.layers, student.model.layers, strict=True)
    for theirs, ours in cast("Iterable[tuple[DecoderLayer, DecoderLayer]]", layers):
        with torch.no_grad():
            h = theirs.input_layernorm(x)
            wanted = theirs.self_attn(h, positions)
            x = theirs(x, positions)
        total = total + (ours.self_attn(h, own) - wanted).square().sum() / wanted.square().sum()
    return total / len(teacher.model.layers)


def _batch(step: int, count: int, options: HealOptions) -> Tensor:
    """Every sequence once a round, in an order of its own: a function of the step, so that runs resume exactly."""
    per_round = count // options.batch_size
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + step // per_round) % 2**63)
    order = torch.randperm(count, generator=generator)
    first = step % per_round * options.batch_size
    return order[first : first + options.batch_size]


def _trained(student: Decoder, options: HealOptions) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in student.named_parameters():
        wanted = {
            "all": True,
            "attention": ".self_attn." in name,
            "lora": name.endswith((".lora_a", ".lora_b")),
        }[options.train]
        parameter.requires_grad_(wanted)
        if wanted:
            yield name, parameter


def _resume(
    state: Path, student: Decoder, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, fingerprint: str
) -> _Progress | None:
    """Go back to where an earlier run was interrupted, if one was."""
    found = list_checkpoints(state)
    if not found:
        return None
    saved = load_checkpoint(found[-1])
    moment = saved.state
    with saved_in(found[-1], TrainingError, f"remove {state} to begin this healing again"):
        if moment.pop("fingerprint") != fingerprint:
            raise TrainingError(
                f"{state.parent} holds an unfinished healing with other text or options: repeat those, or remove "
                f"{state}."
            )
        done = as_saved(_Progress, moment)
        restore_weights(dict(student.named_parameters()), saved.weights, required=trained)
        restore_optimizers(trained, [optimizer], saved.optimizer)
    return done


def _fingerprint(tokens: Tensor, options: HealOptions, held_out: Tensor | None) -> str:
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    for text in (tokens,) if held_out is None else (tokens, held_out):
        digest.update(text.numpy().tobytes())
    return digest.hexdigest()
