"""`heal_checkpoint`: a converted model learns what its source predicts (as X-EcoMLA, arXiv 2503.11132)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentkv.convert.heal_loop import STATE, Evaluation, evaluation, tokens_after, train
from latentkv.convert.heal_options import HealOptions
from latentkv.convert.lora import low_rank_updates
from latentkv.convert.norms import without_norms
from latentkv.convert.quality import Quality, compare
from latentkv.convert.record import add_healing, require_record
from latentkv.errors import TrainingError
from latentkv.models.config import MLAConfig
from latentkv.models.config_reader import read_config
from latentkv.models.decoder import Decoder
from latentkv.models.loading import load_model, save_pretrained
from latentkv.models.stored_config import stored_dtype
from latentkv.targets import require_folder
from latentkv.train.gathered import gathered
from latentkv.train.ranks import DataRanks, own_rows

_CURVE_POINTS = 200


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


def heal_checkpoint(
    folder: Path,
    teacher: Path,
    tokens: Tensor,
    options: HealOptions,
    *,
    held_out: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
    ranks: DataRanks | None = None,
) -> Healing | None:
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
        ranks: the processes that train it together, of which the first one writes; None: this one alone.

    Returns:
        What was done, in each process; None where a signal to one of several has stopped all, and the run is saved.

    Raises:
        TrainingError: the models do not belong together (see `require_healable`), there are fewer sequences than a
            batch needs, an interrupted run cannot be gone on with, or healing would make the model worse.
        CheckpointError: a model cannot be read or written.
    """
    ranks = ranks or DataRanks()
    require_healable(folder, teacher, options, processes=ranks.size)
    guard = held_out
    if guard is None:
        tokens, guard = hold_out(tokens)
    if len(tokens) < options.batch_size:
        raise TrainingError(
            f"{len(tokens)} sequences to train on are fewer than a batch of {options.batch_size}: give more text, or a "
            "smaller --batch-size."
        )
    student = load_model(folder, dtype=torch.float32)
    source = _load_teacher(teacher, torch.float32, ranks)

    def measured(stage: str) -> Quality:
        return compare(
            source, student, guard, on_progress=lambda done, total: on_progress(stage, done, total), ranks=ranks
        )

    before = measured("measure before, sequences")
    if options.dtype == "bf16":
        source = _load_teacher(teacher, torch.bfloat16, ranks)
    with without_norms(student), _updates(student, options):
        done = train(student, source, tokens, options, held_out, folder, on_progress, ranks)
    if done is None:
        return None
    dtype = stored_dtype(student.config)
    _round(student, dtype)
    if options.dtype == "bf16":
        source = _load_teacher(teacher, torch.float32, ranks)
    after = measured("measure after, sequences")
    _require_no_worse(folder, student, before, after, options, ranks)
    if held_out is not None:
        done.evaluations.append(evaluation(after, options.steps, tokens, options))
    healing = Healing(
        tuple(done.losses), tuple(done.evaluations), tokens_after(options.steps, tokens, options), done.seconds
    )
    healed = gathered(student, ranks)
    if ranks.is_first:
        save_pretrained(healed, folder, dtype=dtype)
        add_healing(folder, dict(about or {}) | _described(healing, tokens, options), number=done.number)
        shutil.rmtree(folder / STATE, ignore_errors=True)
    ranks.wait()
    return healing


def _load_teacher(teacher: Path, dtype: torch.dtype, ranks: DataRanks) -> Decoder:
    """The source, shared out among the processes."""
    source = load_model(teacher, dtype=dtype).requires_grad_(False)
    ranks.shard(source, dtype)
    return source


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


def require_healable(folder: Path, teacher: Path, options: HealOptions, *, processes: int = 1) -> None:
    """Refuse what `heal_checkpoint` cannot heal, by the two configs alone: before any text or weight is read.

    Raises:
        TrainingError: the target is the teacher, was not converted or cannot be written, or the two do not fit; a
            batch has not as many sequences for each of the processes.
        ConfigError: a config cannot be read.
    """
    if options.batch_size % processes:
        raise TrainingError(
            f"A batch of {options.batch_size} sequences cannot be shared out among {processes} processes: make "
            f"--batch-size a multiple of {processes}."
        )
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder: name the model that `latentkv convert` wrote.")
    require_folder(folder, TrainingError, apart=[("the teacher", teacher)])
    student, source = read_config(folder), read_config(teacher)
    if not isinstance(student.attention, MLAConfig):
        raise TrainingError(f"{folder} has no latent attention: heal what `latentkv convert` wrote.")
    shapes = ["vocab_size", *(["hidden_size"] if options.match_steps or options.hidden_weight else [])]
    shapes += ["num_layers"] if options.match_steps else []
    for name in shapes:
        ours, theirs = getattr(student, name), getattr(source, name)
        if ours != theirs:
            raise TrainingError(
                f"{teacher} is not the source of {folder}, whose {name} is {ours:,}, not {theirs:,}: give the model "
                "that was converted as --teacher."
            )
    require_record(folder)


def _require_no_worse(
    folder: Path, student: Decoder, before: Quality, after: Quality, options: HealOptions, ranks: DataRanks
) -> None:
    """Refuse, before anything is replaced, a model that is not finite or farther from its source than it was."""
    finite = not ranks.any(not all(bool(torch.isfinite(rows).all()) for rows in _own_weights(student)))
    if finite and math.isfinite(after["converted"]) and after["divergence"] <= before["divergence"]:
        return
    if ranks.is_first:
        shutil.rmtree(folder / STATE, ignore_errors=True)  # so that another --lr can be tried
    what = f"{before['divergence']:.4g} before, {after['divergence']:.4g} after" if finite else "weights not finite"
    raise TrainingError(
        f"Healing would make {folder} worse (KL to the source on held-out text: {what}), so it stays as it was: give a "
        f"lower --lr than {options.lr:g}, or more text."
    )


def _updates(student: Decoder, options: HealOptions) -> AbstractContextManager[None]:
    if options.train != "lora":
        return nullcontext()
    return low_rank_updates(student, rank=options.lora_rank, alpha=options.lora_alpha, seed=options.seed)


@torch.no_grad()
def _round(student: Decoder, dtype: torch.dtype) -> None:
    """To the numbers that will be stored."""
    for rows in _own_weights(student):
        rows.copy_(rows.to(dtype))


def _own_weights(student: Decoder) -> Iterator[Tensor]:
    """Of every weight the rows that this process has, to be read and written in place."""
    # Of what was gathered to compute with, `parameters` would give copies, which are dropped again.
    return (own_rows(tensor)[0] for tensor in student.state_dict().values())


def _described(healing: Healing, tokens: Tensor, options: HealOptions) -> dict[str, Any]:
    """For the report: losses as [tokens seen, mean loss since the point before]."""
    cut = min(options.match_steps, options.steps)

    def curve(first: int, last: int) -> list[tuple[int, float]]:
        width = max(1, -(-(last - first) // _CURVE_POINTS))
        windows = [range(start, min(start + width, last)) for start in range(first, last, width)]
        return [
            (tokens_after(steps.stop, tokens, options), sum(healing.losses[step] for step in steps) / len(steps))
            for steps in windows
        ]

    facts = asdict(healing)
    del facts["losses"]
    return asdict(options) | facts | {"matching": curve(0, cut), "curve": curve(cut, options.steps)}
