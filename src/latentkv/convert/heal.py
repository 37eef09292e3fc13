"""`heal_checkpoint`: a converted model learns what its source predicts (KL alone: X-EcoMLA, arXiv 2503.11132)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentkv.convert.export import NORM_EXPONENT
from latentkv.errors import TrainingError
from latentkv.files import write_json
from latentkv.models.config import MLAConfig
from latentkv.models.decoder import Decoder, DecoderLayer
from latentkv.models.loading import load_model, save_pretrained, stored_dtype
from latentkv.models.mla import MultiHeadLatentAttention
from latentkv.train.checkpoints import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from latentkv.train.optimizers import optimizer_tensors, restore_optimizers
from latentkv.train.schedule import warmed_cosine

HEALING_FILE = "healing.json"
_STATE = ".healing"
_SAVE_SECONDS = 60
_WARMUP_STEPS = 20
_FLOOR = 0.1  # of the learning rate, at the end


@dataclass(frozen=True)
class HealOptions:
    """How to heal.

    Attributes:
        steps: optimiser steps, those of `match_steps` included.
        match_steps: so many first steps bring each layer's attention nearer to the source's on the source's own states.
        batch_size: sequences a step.
        lr: highest learning rate; a cosine leads from it to a tenth.
        train: "attention" alone, or "all" weights (norms and embeddings included).
        seed: of the order of the sequences.
    """

    steps: int = 500
    match_steps: int = 0
    batch_size: int = 8
    lr: float = 1e-3
    train: Literal["attention", "all"] = "all"
    seed: int = 0


@dataclass(frozen=True)
class Healing:
    """What healing did.

    Attributes:
        losses: [steps] KL(source || converted) in nats a token, of each step's batch before the step; while layers are
            matched, the mean over layers of |converted - source|^2 / |source|^2.
        tokens: that were trained on, repetitions counted.
        seconds: of training.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float


def heal_checkpoint(
    folder: Path,
    teacher: Path,
    tokens: Tensor,
    options: HealOptions,
    *,
    on_progress: Callable[[int, int, float], object] = lambda step, steps, loss: None,
) -> Healing:
    """Train the converted model in `folder` in place; an interrupted run goes on when called again.

    Args:
        folder: of a converted model.
        teacher: its source.
        tokens: [sequences, length] int64 text, of the source or of what the model is for.
        options: how.
        on_progress: called with the step, all steps, and the loss.

    Raises:
        TrainingError: there are fewer sequences than a batch needs, or the two models have different tokens.
        CheckpointError: a model cannot be read or written.
    """
    student = load_model(folder, dtype=torch.float32)
    source = load_model(teacher, dtype=torch.float32).requires_grad_(False)
    if student.config.vocab_size != source.config.vocab_size:
        raise TrainingError(f"{folder} and {teacher} have different vocabularies: {teacher} is not its source.")
    if not isinstance(student.config.attention, MLAConfig):
        raise TrainingError(f"{folder} has no latent attention: heal what `latentkv convert` wrote.")
    if len(tokens) < options.batch_size:
        raise TrainingError(f"{len(tokens)} sequences are fewer than a batch of {options.batch_size}: give more text.")
    dtype = stored_dtype(student.config)
    with _without_norms(student):
        healing = _train(student, source, tokens, options, folder / _STATE, on_progress)
    save_pretrained(student, folder, dtype=dtype)
    write_json(folder / HEALING_FILE, asdict(options) | asdict(healing))
    shutil.rmtree(folder / _STATE, ignore_errors=True)
    return healing


def _train(
    student: Decoder,
    teacher: Decoder,
    tokens: Tensor,
    options: HealOptions,
    state: Path,
    on_progress: Callable[[int, int, float], object],
) -> Healing:
    trained = dict(_trained(student, options))
    optimizer = torch.optim.AdamW(trained.values(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    fingerprint = _fingerprint(tokens, options)
    losses, seconds = _resume(state, trained, optimizer, fingerprint)
    began = saved = time.monotonic()
    student.train()
    for step in range(len(losses), options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warmed_cosine(step, step / options.steps, warmup=_WARMUP_STEPS, floor=_FLOOR)
        batch = tokens[_batch(step, len(tokens), options)]
        measure = _mismatch if step < options.match_steps else _divergence
        loss = measure(student, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"Healing diverged at step {step}: give a lower --lr than {options.lr:g}.")
        on_progress(step + 1, options.steps, losses[-1])
        if time.monotonic() - saved > _SAVE_SECONDS:
            saved = time.monotonic()
            spent = seconds + saved - began
            moment = {"fingerprint": fingerprint, "losses": losses, "seconds": spent}
            save_checkpoint(
                state, step + 1, Checkpoint(dict[str, Tensor](trained), optimizer_tensors(trained, [optimizer]), moment)
            )
    student.eval()
    return Healing(
        tuple(losses), options.steps * options.batch_size * tokens.shape[1], seconds + time.monotonic() - began
    )


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
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step // per_round)
    order = torch.randperm(count, generator=generator)
    first = step % per_round * options.batch_size
    return order[first : first + options.batch_size]


def _trained(student: Decoder, options: HealOptions) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in student.named_parameters():
        wanted = options.train == "all" or ".self_attn." in name
        parameter.requires_grad_(wanted)
        if wanted:
            yield name, parameter


def _resume(
    state: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, fingerprint: str
) -> tuple[list[float], float]:
    found = list_checkpoints(state)
    if not found:
        return [], 0.0
    saved = load_checkpoint(found[-1])
    if saved.state["fingerprint"] != fingerprint:
        raise TrainingError(
            f"{state.parent} holds an unfinished healing with other text or options: repeat those, or remove {state}."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved.weights[name])
    restore_optimizers(trained, [optimizer], saved.optimizer)
    return list(saved.state["losses"]), float(saved.state["seconds"])


def _fingerprint(tokens: Tensor, options: HealOptions) -> str:
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _without_norms(student: Decoder) -> Generator[None]:
    """Take the linearised norms out while training, and put them back: their weights have no scale to be trained on."""
    taken: list[tuple[Any, str, nn.Module]] = []
    layers = [module for module in student.modules() if isinstance(module, MultiHeadLatentAttention)]
    for attention in layers:
        parts = [("kv_a_proj_with_mqa", "kv_a_layernorm", attention.config.kv_lora_rank)]
        if attention.config.q_lora_rank is not None:
            parts.append(("q_a_proj", "q_a_layernorm", attention.config.q_lora_rank))
        for projection, norm, rank in parts:
            _scale(getattr(attention, projection), rank, _gain(getattr(attention, norm)))
            taken.append((attention, norm, getattr(attention, norm)))
            setattr(attention, norm, nn.Identity())
    try:
        yield
    finally:
        for attention, norm, module in taken:
            setattr(attention, norm, module)
            projection, rank = (
                (attention.kv_a_proj_with_mqa, attention.config.kv_lora_rank)
                if norm == "kv_a_layernorm"
                else (attention.q_a_proj, attention.config.q_lora_rank)
            )
            _scale(projection, rank, 1 / _gain(module))


def _gain(norm: Any) -> float:
    """What a linearised norm multiplies by."""
    weight = norm.weight
    if not bool((weight == 2.0**NORM_EXPONENT).all()):
        raise TrainingError("This model's latent norms are not those of a conversion: train it with `latentkv train`.")
    return 2.0**NORM_EXPONENT / math.sqrt(norm.eps)


@torch.no_grad()
def _scale(projection: nn.Linear, rank: int, factor: float) -> None:
    projection.weight[:rank] *= factor
    for name, parameter in projection.named_parameters():
        if name == "bias":
            parameter[:rank] *= factor
